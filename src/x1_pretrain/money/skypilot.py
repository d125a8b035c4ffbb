"""A SkyPilot task for a job: for who already rents through SkyPilot. Written here, never imported.

`sky jobs launch skypilot.yaml --secret X1_ALERTS` finds a machine, and another when that one is lost.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from decimal import Decimal
from textwrap import indent

from x1_pretrain.errors import INTERRUPTED, UserError
from x1_pretrain.money.bootstrap import start_script
from x1_pretrain.money.job import Job

_SCRIPT_END = "X1_START_END"

_CAN_NOT = """\
# Written by X1 for SkyPilot 0.14. Start it with:
#   sky jobs launch skypilot.yaml{secrets}
#
# What SkyPilot does here: finds the cheapest machine below max_hourly_cost, starts the job, and starts it
# again on another machine when this one is lost or the job exits with {again}.
# What it can't do:
#   - cap the total. max_hourly_cost filters its own price list, which may be older than the provider's price;
#     nothing counts dollars over the run. X1 does, on the machine, at max_hourly_cost for every hour.
#   - keep what is on the disk when a machine is lost: Lambda and RunPod disks go with it, and SkyPilot
#     mounts no buckets on RunPod. Without a mirror (mirror.uri) a recovered job begins at step 0, and so does
#     what it counts as spent: then the cap holds for each machine, not for the run. Watch `sky jobs queue`.
#   - give up: it looks for a free machine for as long as you let it.
#   - cost nothing itself: its controller is a machine of its own, about $0.25/h, and not on Lambda.
#   - confirm that a machine is gone, or find it after autostop failed (autostop runs on that machine).
#   - rent spot machines at Lambda or RunPod: neither sells them.
#   - with 0.14, use network volumes at RunPod: it calls an interface that RunPod closed on 2026-11-15.
"""


def skypilot_task(job: Job, gpu: str, max_hourly_cost: Decimal, disk_gib: int = 200) -> str:
    """The task's YAML. `gpu` as X1 says it (a100-80gb); `max_hourly_cost` also is the rate that X1 counts."""
    if not (max_hourly_cost.is_finite() and max_hourly_cost > 0):
        raise UserError(f"max_hourly_cost {max_hourly_cost}: expected more than 0")
    # SkyPilot names its machines itself, so the supervisor can't ask a provider about its own
    counted = replace(job, provider="local", rate_usd_per_hr=max_hourly_cost)
    return "\n".join(
        [_head(job), _resources(job, gpu, max_hourly_cost, disk_gib), _names(job), _work(counted)]
    )


def _head(job: Job) -> str:
    secrets = "".join(f" --secret {name}" for name in job.passed_variables)
    text = _CAN_NOT.format(secrets=secrets, again=INTERRUPTED)
    return f"{text}\nname: {json.dumps(job.tag)}\n"


def _resources(job: Job, gpu: str, max_hourly_cost: Decimal, disk_gib: int) -> str:
    if job.gpus < 1:
        raise UserError("gpus 0: a SkyPilot task without a GPU is not written; set gpus to 1 or more")
    return f"""\
resources:
  accelerators: {json.dumps(f"{gpu.upper()}:{job.gpus}")}
  any_of:
    - infra: lambda  # a virtual machine: the script makes its own environment
    - infra: runpod  # a container
      image_id: docker:{job.image}
  use_spot: false
  max_hourly_cost: {max_hourly_cost}
  disk_size: {disk_gib}  # GiB
  autostop:
    idle_minutes: 5
    down: true
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 0  # 76 and 77 are the budget's stop, 78 a refusal: never again
    recover_on_exit_codes: [{INTERRUPTED}]
"""


def _names(job: Job) -> str:
    """Variables by name: `null` has SkyPilot take the value from the command line."""
    secrets = "".join(f"  {name}: null\n" for name in job.passed_variables)
    listed = f"secrets:\n{secrets}" if secrets else "secrets: {}\n"
    return f'envs:\n  SKYPILOT_DISABLE_USAGE_COLLECTION: "1"\n\n{listed}'


def _work(job: Job) -> str:
    """`setup` prepares, `run` is the job in the foreground, so that SkyPilot sees its exit code."""
    script = f"{job.workspace}/start.sh"
    folder = shlex.quote(job.workspace)
    setup = f"""\
SUDO=$([ "$(id -u)" = 0 ] || echo sudo)
$SUDO mkdir -p {folder}
$SUDO chown "$(id -u)" {folder}
cat >{script} <<'{_SCRIPT_END}'
{start_script(job)}{_SCRIPT_END}
bash {script} prepare
"""
    return f"setup: |\n{indent(setup, '  ', lambda _: True)}\nrun: |\n  exec bash {script} supervise\n"
