# X1 on NVIDIA's PyTorch image, on a pinned tag: Python 3.12, torch 2.13.0a0, CUDA 13.3 (driver 580 or newer).
#
#   docker build -t x1 .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data/x1:/workspace x1 x1 train --config ...
#
# Older tags: 24.10 and 24.08 have Python 3.10 and torch 2.5, which X1 does not run on (pip says so). There,
# x1 launch's start script makes an environment of its own beside the image's. Up to 26.03 torch is older than
# a release of 2.11, and pip would replace it by another build: the check below stops such an image.
FROM nvcr.io/nvidia/pytorch:26.07-py3

WORKDIR /opt/x1
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY configs ./configs

# An environment that sees the image's torch, and must still see the same one after the install.
RUN python3 -m venv --system-site-packages /opt/x1/venv \
    && version() { /opt/x1/venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))'; } \
    && before=$(version) \
    && /opt/x1/venv/bin/python -m pip install --no-cache-dir . \
    && after=$(version) \
    && { [ "$after" = "$before" ] || { echo "torch $before was replaced by $after" >&2; exit 1; }; } \
    && /opt/x1/venv/bin/x1 --version

ENV PATH=/opt/x1/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /workspace
# The image's own entry point stays: it runs what follows, `x1 ...` or a provider's arguments.
CMD ["x1", "--help"]
