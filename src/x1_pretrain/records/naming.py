"""What a run is called where several of one config may lie side by side."""

from __future__ import annotations

from x1_pretrain.records.run_folder import Run


def titled(run: Run) -> str:
    """The name in its config; its folder's too where that is another."""
    folder = run.folder.resolve().name
    return run.name if folder in ("", run.name) else f"{run.name} ({folder})"
