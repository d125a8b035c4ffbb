"""`x1`: one verb a line, each in the module that does it. Imports nothing heavy."""

from __future__ import annotations

import importlib
import sys

from x1_pretrain import __version__

# verb -> (module with a typer `app`, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "plan": ("x1_pretrain.planning.command", "from dollars to a run: every number with its formula"),
    "tokenize": ("x1_pretrain.tokenize_data", "raw text (parquet, jsonl, plain files) -> a corpus folder"),
    "doctor": ("x1_pretrain.doctor.command", "before money is burnt: is this machine fit for this run?"),
    "train": ("x1_pretrain.train", "train from a config; the same command resumes"),
    "watch": ("x1_pretrain.records.live", "a run, live in the terminal, from its files alone"),
    "report": ("x1_pretrain.report.command", "runs -> one page that opens anywhere: report.html"),
    "postmortem": ("x1_pretrain.postmortem.command", "what a loss spike was, what it cost, what to do"),
    "isoflop": ("x1_pretrain.laws.isoflop", "small runs of several sizes on one budget, for a law"),
    "fit": ("x1_pretrain.fit_scaling_law", "measured runs -> a scaling law with honest intervals"),
    "predict": ("x1_pretrain.laws.predict", "what a law says: tokens for a size, loss, the next run"),
    "launch": ("x1_pretrain.money.launch", "price a run, rent its machine, guard it until it is gone"),
    "supervise": ("x1_pretrain.money.supervise", "sidecar and trainer on this machine, kept alive"),
    "runs": ("x1_pretrain.runs.command", "every run, here and mirrored; trash, restore"),
    "push": ("x1_pretrain.mirror.push_command", "send a run to a mirror"),
    "pull": ("x1_pretrain.mirror.pull_command", "fetch a run, its final model or its report from a mirror"),
    "budget": ("x1_pretrain.money.budget_command", "what a run cost; a person's word to its guard"),
    "guard": ("x1_pretrain.money.guard_command", "from off the machine: what it costs, and that it ends"),
    "teardown": ("x1_pretrain.money.teardown", "end a run's machines, and see that they are gone"),
    "reconcile": ("x1_pretrain.money.reconcile", "providers against ledgers; end orphans"),
    "fake-provider": ("x1_pretrain.money.providers.fake.server", "a provider of our own, to rehearse with"),
    "export": ("x1_pretrain.export_run", "a run -> the folder of artifacts to show others"),
    "verify": ("x1_pretrain.review.command", "check a run as a careful reviewer would"),
    "demo": ("x1_pretrain.demo", "the whole way in minutes, on this machine's own Python as text"),
}

HELP = "usage: x1 VERB [OPTIONS]\n\nPretrain a language model under a hard budget, every number measured.\n"


def usage() -> str:
    """The page `x1 --help` prints."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{text}" for verb, (_, text) in VERBS.items())
    return f"{HELP}\n{verbs}\n\n`x1 VERB --help` lists a verb's options. `x1 --version` prints the version."


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `x1` script."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0)
    if args[0] in ("-V", "--version"):
        print(f"x1 {__version__}")
        raise SystemExit(0)
    if args[0] not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(args[0], VERBS, n=1)
        hint = f": did you mean `x1 {near[0]}`?" if near else ""
        print(f"x1: there is no verb '{args[0]}'{hint} (`x1 --help` lists them)", file=sys.stderr)
        raise SystemExit(2)
    from x1_pretrain.command import run

    try:
        module = importlib.import_module(VERBS[args[0]][0])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(run(module.app, args[1:], prog=f"x1 {args[0]}"))


if __name__ == "__main__":
    main()
