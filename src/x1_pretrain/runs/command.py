"""Every run, here and in its mirror; and a trash for those that are no longer wanted.

x1 runs
x1 runs s3://bucket/runs
x1 runs rm x1-50m-a100
x1 runs restore x1-50m-a100
x1 runs gc --yes
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, REFUSED, UserError
from x1_pretrain.mirror.head import NAME as HEAD
from x1_pretrain.money.clock import duration_s
from x1_pretrain.numbers import size
from x1_pretrain.records import runs, runs_table, trash
from x1_pretrain.records.runs import Listed
from x1_pretrain.runs import emptying
from x1_pretrain.runs import removal as removing
from x1_pretrain.runs.listing import Place, is_address, joined, look_at, places
from x1_pretrain.runs.removal import Removal
from x1_pretrain.stores.address import is_uri, parse
from x1_pretrain.stores.store import StoreError

RUNS = "runs"
RETRIES = 1


class Words(typer.core.TyperGroup):
    """`x1 runs` and `x1 runs FOLDER` list; only `rm`, `restore` and `gc` are words of their own."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["list", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Those of the list, which has no word of its own to ask for help with."""
        listing = self.commands["list"]
        told = [
            one.get_help_record(ctx) for one in listing.get_params(ctx) if one.param_type_name == "option"
        ]
        with formatter.section("Options of the list"):
            formatter.write_dl([record for record in told if record])
        self.format_commands(ctx, formatter)


HELP = """Every run, here and in its mirror; and a trash for those that are no longer wanted.

`x1 runs [FOLDER|URI]` lists them. A checkpoint counts as good there if its manifest can be read and its files
have the sizes it says; nothing is hashed (`x1 verify` does)."""

app = typer.Typer(
    cls=Words,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=HELP,
    options_metavar="",
    subcommand_metavar="[FOLDER|URI] [OPTIONS] | COMMAND [ARGS]...",
)

Folder = Annotated[str | None, typer.Argument(metavar="[FOLDER|URI]", help="of runs; `runs` if left out")]
Mirror = Annotated[str | None, typer.Option("--mirror", metavar="URI", help="a mirror no config here names")]
Endpoint = Annotated[str | None, typer.Option(help="of a store that speaks S3: R2, B2, MinIO")]
Local = Annotated[bool, typer.Option("--local", help="ask no mirror")]
Yes = Annotated[bool, typer.Option("--yes", help="do it without asking")]
RunsFolder = Annotated[Path, typer.Option("--runs", help="the folder of runs that a name is looked for in")]


# -----------------------------------------------------------------------------------------------------------
# The list


@app.command("list")
def list_(
    folder: Folder = None,
    mirror: Mirror = None,
    endpoint: Endpoint = None,
    local: Local = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything, for a program")] = False,
) -> None:
    """Every run: newest first. `x1 runs` is short for it. What a mirror does not answer within 10 s is left
    out, and said."""
    found, trouble = collect(folder or RUNS, mirror, endpoint, local, missing_ok=folder is None)
    for line in trouble:
        print(f"x1: {line}", file=sys.stderr)
    if as_json:
        tree = {"schema_version": 1, "kind": "runs", "runs": [one.to_json() for one in found]}
        print(json.dumps(tree | {"trouble": trouble}, indent=1, ensure_ascii=False))
        return
    if not found:
        print(f"no runs in {folder or RUNS}; `x1 train` begins one, `x1 runs URI` lists a mirror")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    print("\n".join(runs_table.lines(found, width)))


def collect(
    where: str, mirror: str | None, endpoint: str | None, local: bool, missing_ok: bool = False
) -> tuple[list[Listed], list[str]]:
    """The runs of a folder and of the mirrors they name, or of a mirror alone; and what could not be read."""
    if is_mirror(where):
        place = Place(parse(where), endpoint)
        seen = look_at([place])
        if seen.trouble and not seen.runs:
            raise UserError(seen.trouble[0])
        return runs.newest_first(seen.runs), seen.trouble
    folder = Path(where)
    if not folder.is_dir() and not missing_ok:
        raise UserError(
            f"{where}: no such folder; name a folder of runs, or a mirror such as s3://bucket/runs"
        )
    try:
        here = runs.local_runs(folder, time.time()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{error.filename or folder}: can't be read ({error.strerror})") from None
    trouble = [f"{one.folder}: {one.trouble}" for one in here if one.trouble]
    named, wrong = places(here)
    if mirror:
        named = [Place(parse(mirror), endpoint), *(p for p in named if p.address != parse(mirror))]
    seen = look_at([] if local else named)
    found = joined(here, seen.runs, seen.heads)
    if runs.is_begun(folder):  # the one that was asked for, and not all that its mirror has
        found = [one for one in found if one.folder]
    return runs.newest_first(found), [*trouble, *wrong, *seen.trouble]


def is_mirror(text: str) -> bool:
    """A URI; or a folder that has a head, or whose runs have."""
    folder = Path(text)
    if is_uri(text) or not folder.is_dir():
        return is_uri(text)
    heads = (one for form in (HEAD, f"*/{HEAD}") for one in folder.glob(form))
    return not runs.is_begun(folder) and next(heads, None) is not None


# -----------------------------------------------------------------------------------------------------------
# rm


@app.command()
def rm(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, a name under runs/, or its URI")],
    mirror: Mirror = None,
    endpoint: Endpoint = None,
    only: Annotated[str | None, typer.Option(metavar="here|mirror", help="leave the other copy")] = None,
    yes: Yes = False,
    name: Annotated[str | None, typer.Option(help="typed: for the last copy of a finished run")] = None,
    runs_folder: RunsFolder = Path(RUNS),
) -> int:
    """Move a run to the trash, here and in its mirror. It can be restored for 7 days, and until `gc` runs.

    Refused: a run that is going on, a run that others began from, and the last copy of a finished run unless
    its name is typed."""
    if only not in (None, "here", "mirror"):
        raise UserError(f"--only {only}: expected here or mirror")
    there = parse(mirror) if mirror else None
    with ExitStack() as held:
        planned = removing.plan_removal(run, there, endpoint, only, runs_folder, held)
        others, trouble = _others(planned, runs_folder)
        removing.refuse_parent(planned, others, [] if only == "here" else trouble)
        said = (f"x1: not all runs could be asked: {line}" for line in trouble)
        print("\n".join([*removing.told(planned), *said]))
        removing.refuse_unnamed(planned, _typed(planned, name, yes))
        if not planned.last_copy and not _agreed(yes):
            print("nothing was moved")
            return REFUSED
        now = datetime.now(UTC)
        for line in removing.carry_out(planned, now, os.uname().nodename):
            print(line)
    back = shlex.join(["x1", "runs", "restore", *_way_back(planned, mirror, endpoint)])
    print(f"`{back}` brings it back until {(now + trash.KEPT):%Y-%m-%d}")
    return FINISHED


def _way_back(planned: Removal, mirror: str | None, endpoint: str | None) -> list[str]:
    """What `restore` has to be told: with a folder its note knows the rest, but for what was typed here."""
    if planned.folder is None:
        assert planned.mirrored is not None, "a removal removes something"
        place = planned.mirrored.place
        uri = place.address.of_run(planned.name)
        words, mirror, endpoint = [uri], None, place.endpoint
    else:
        beside = planned.folder.absolute().parent
        elsewhere = beside.resolve() != Path(RUNS).resolve()
        words = [planned.name, *(["--runs", str(planned.folder.parent)] if elsewhere else [])]
    words += ["--mirror", mirror] if mirror and planned.mirrored else []
    return words + (["--endpoint", endpoint] if endpoint and planned.mirrored else [])


def _others(planned: Removal, runs_folder: Path) -> tuple[list[Listed], list[str]]:
    """All runs that may have begun from this one: beside it, under runs/, and in the mirrors of all those;
    and who did not answer."""
    folders = [runs_folder, *([planned.folder.parent] if planned.folder else [])]
    here = [
        one
        for folder in {f.resolve(): f for f in folders if f.is_dir() and not runs.is_begun(f)}.values()
        for one in runs.local_runs(folder, time.time())
    ]
    named, wrong = places(here)
    if planned.mirrored:
        place = planned.mirrored.place
        named = [*(other for other in named if other.address != place.address), place]
    seen = look_at(named)
    return [*here, *seen.runs], [*wrong, *seen.trouble]


def _typed(planned: Removal, name: str | None, yes: bool) -> str | None:
    """The name that a person gave, or gives now."""
    if name is not None or not planned.last_copy or yes or not sys.stdin.isatty():
        return name
    try:
        return input(f"no copy would be left; type its name ({planned.name}) to go on: ").strip() or None
    except EOFError:
        return None


def _agreed(yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("no terminal to ask at; add --yes")
    try:
        return input("move it to the trash? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


# -----------------------------------------------------------------------------------------------------------
# restore


@app.command()
def restore(
    run: Annotated[str, typer.Argument(metavar="RUN", help="its name, or that of its entry in the trash")],
    mirror: Mirror = None,
    endpoint: Endpoint = None,
    local: Local = False,
    runs_folder: RunsFolder = Path(RUNS),
) -> int:
    """Bring a run back from the trash: here, and in the mirror it had."""
    entries = [] if is_address(run) else trash.find(runs_folder, run)
    folder = entries[0].folder if entries else removing.find_folder(run, runs_folder)
    listed = runs.look(folder, time.time()) if folder else None
    where = removing.where_mirrored(run, folder, listed, parse(mirror) if mirror else None, endpoint)
    place, name = where or (None, run)
    done, failed = [], None
    if place and not local:
        try:
            done += emptying.restore_there(place.open(RETRIES), name, entries[0].run_id if entries else None)
        except (StoreError, UserError) as error:
            if not entries:
                raise UserError(str(error)) from None
            failed = str(error)
    if entries:
        done.append(f"{trash.put_back(entries[0])} is back")
    if not done:
        there = f" or of {place.address}" if place and not local else ""
        raise UserError(f"{run}: not in the trash of {runs_folder}/{there}; `x1 runs` lists what is there")
    print("\n".join(done))
    for older in entries[1:]:
        print(f"an older one of this name stays in the trash: {older.folder.name}")
    if failed:
        print(f"x1: its copy in the mirror stays in the trash: {failed}", file=sys.stderr)
    return FAULT if failed else FINISHED


# -----------------------------------------------------------------------------------------------------------
# gc


@app.command()
def gc(
    folder: Folder = None,
    mirror: Mirror = None,
    endpoint: Endpoint = None,
    local: Local = False,
    yes: Yes = False,
    older_than: Annotated[str, typer.Option(metavar="7d", help="in the trash for so long")] = "7d",
) -> int:
    """Delete for good what has been in the trash for 7 days, what broken uploads left in a mirror, and its
    corpora that no run there names any more.

    Without --yes it only shows what would go."""
    if older_than.strip()[-1:].isdigit():  # 7 seconds, where 7 days were meant, would delete it all
        raise UserError(f"--older-than {older_than}: expected a time with its unit, such as 7d or 12h")
    age_s, where = duration_s(older_than, "--older-than"), folder or RUNS
    alone = is_mirror(where)
    if folder and not alone and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of runs, or a mirror")
    found, trouble = ([], []) if alone else emptying.mirrors(where, mirror, endpoint, local)
    stores = [Place(parse(where), endpoint)] if alone else found
    freed = 0 if alone else emptying.gc_here(Path(where), age_s, yes)
    for place in stores:
        try:
            freed += emptying.gc_there(place, place.open(RETRIES), age_s, yes, trouble)
        except (StoreError, UserError) as error:
            trouble.append(str(error))
    for line in trouble:
        print(f"x1: {line}", file=sys.stderr)
    if not freed:
        print(f"nothing in the trash is older than {older_than}")
    elif not yes:
        print(f"{size(freed)} would be freed; nothing was deleted: add --yes")
    else:
        print(f"{size(freed)} freed")
    return FAULT if trouble else FINISHED


if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 runs"))
