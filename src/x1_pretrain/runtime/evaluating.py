"""Between two steps: what the model has learned, as validation losses and in its own words."""

from __future__ import annotations

from contextlib import suppress

import torch

from x1_pretrain import errors
from x1_pretrain.evals.perplexity import evaluate
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.runtime import assemble, memory
from x1_pretrain.runtime.run import Run


def evaluated(run: Run) -> dict[str, float] | None:
    """The validation row, None if interrupted. In a micro-batch of its own, planned inside the memory that is
    free now; training's stays as it is."""
    run.enter("evaluation")
    machine, model = run.machine, run.config.model
    size = min(machine.micro_batch, machine.evaluation_batch or machine.micro_batch)
    if assemble.is_cuda(run.world):
        room = memory.room_gib(run.world.device)
        size = memory.evaluation_batch(model, size, machine.precision == "bf16", room)
    while True:
        # compiled blocks would be compiled again for another size, which can't be interrupted
        stance = "default" if size == machine.micro_batch else "force_eager"
        with suppress(torch.OutOfMemoryError), torch.compiler.set_stance(stance):
            return evaluate(run.decoder, run.windows, size, run.world, run.interrupted)
        if size == 1 or run.world.size > 1:  # ranks would have to agree
            raise errors.RefusedError(
                f"out of memory in the evaluation of step {run.step}, {size} sequences at a time; relaunch "
                f"with --set training.micro_batch={max(1, machine.micro_batch // 2)}"
            )
        size = machine.evaluation_batch = size // 2
        if assemble.is_cuda(run.world):
            torch.cuda.empty_cache()
        said = f"evaluation ran out of memory: going on with {size} sequences at a time, training as before"
        run.event("micro_batch", said)


def sample(run: Run) -> bool:
    """A few continuations into samples.jsonl; the same seed and step give the same draws."""
    settings = run.config.evaluation
    run.enter("sampling")
    if not run.records:
        return True
    for number, prompt in enumerate(settings.prompts):
        if run.interrupted() and run.world.size == 1:
            return False
        seed = (run.config.seed * 1_000_003 + run.step * 101 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        encoded = run.tokenizer.encode(prompt).tolist() or [run.tokenizer.eot_id]
        ids = torch.tensor([encoded], device=run.world.device)  # (1, T)
        out = run.decoder.generate(
            ids, settings.sample_tokens, settings.temperature, generator, run.tokenizer.eot_id
        )
        # the model may have more ids than the tokenizer
        new = [i for i in out[0, ids.shape[1] :].tolist() if i < run.tokenizer.vocab_size]
        text = run.tokenizer.decode(new)
        said = {"prompt": prompt, "text": text, "temperature": settings.temperature}
        run.records.samples.append({"step": run.step, "tokens": run.tokens, "time_utc": utc_now(), **said})
        run.screen.say(f"  {prompt!r} ... {text!r}")
    return True
