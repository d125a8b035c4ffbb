"""What the tests of the planner share: a machine, a speed, the published 50M model."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from x1_pretrain.config import ModelConfig
from x1_pretrain.money.gate import Price
from x1_pretrain.planning.belief import REFIT
from x1_pretrain.planning.planner import Ask, Machine, Speed

SMALL = ModelConfig(layers=8, d_model=768, heads=12, kv_heads=4, d_ff=2048, context=1024, vocab_size=50257)
PRICE = Price("1x A100 80GB", "RunPod", Decimal("1.19"), "list price", Decimal("0.0278"))
MACHINE = Machine("A100 80GB", 1, PRICE, Decimal("0.9167"), 312e12, 79.0, 300.0)
SPEED = Speed(150e12, "150 TFLOP/s, stated", measured=True)


def ask(*models: ModelConfig, **changes: Any) -> Ask:
    machine = replace(
        MACHINE, **{k: changes.pop(k) for k in list(changes) if k in Machine.__dataclass_fields__}
    )
    return replace(Ask(machine, changes.pop("speed", SPEED), REFIT, models or (SMALL,)), **changes)
