"""A provider to rehearse with: a real HTTP server with machines, money and faults, and no dollar behind it.

    python -m x1_pretrain.money.providers.fake.server --run-in machines --gpu "A100 80GB" --price 1.19

It speaks Lambda's API at <root>/api/v1, RunPod's at <root>/v2 and RunPod's balance at <root>/graphql; the key
is `fake`. Time is that of X1_CLOCK. With --run-in, what a machine is launched with runs here as processes.

<root>/fake is for those who rehearse, and takes no key:
    GET  state    the truth: machines, true bill, requests, faults and how often each fired
    POST faults   one fault or a list (fake/faults.py); DELETE faults: all is well again
    POST reset    all machines gone, no faults
"""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FINISHED, UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.fake import lambda_api, runpod_api
from x1_pretrain.money.providers.fake.catalog import Answer, Call, Prices
from x1_pretrain.money.providers.fake.faults import ANSWERS, Fault, read_fault, read_faults
from x1_pretrain.money.providers.fake.machines import Machine, Time, World
from x1_pretrain.money.providers.fake.processes import Processes
from x1_pretrain.money.providers.fake.sockets import LATE, Server, Silence

TICK_S = 0.02  # real seconds between two looks at the clock and the processes
QUOTA = 6000  # requests a virtual minute, as the RateLimit headers of RunPod tell it
KEY = "fake"


class FakeProvider:
    """The server, its world and its processes; `with FakeProvider(clock) as fake:` for tests."""

    def __init__(
        self,
        clock: Time | None = None,
        *,
        port: int = 0,
        keys: Iterable[str] = (KEY,),
        gpu: str | None = None,
        price_usd_per_hr: Decimal | str | None = None,
        balance_usd: Decimal | str = "100",
        boot_s: float = 30,
        term_s: float = 15,
        grace_s: float = 10,
        launch_every_s: float = 0,
        run_in: Path | None = None,
        disks_die: bool = False,
        faults: Iterable[Fault | Mapping[str, Any]] = (),
    ) -> None:
        clock = clock or Clock.from_environment()
        self.world = World(clock, boot_s=boot_s, term_s=term_s, balance_usd=balance_usd)
        own = None if price_usd_per_hr is None else Decimal(price_usd_per_hr)
        self.prices = Prices(gpu or ("A100 80GB" if own else None), own)
        self.keys = set(keys)
        self.launch_every_s = Decimal(str(launch_every_s))
        self.leaving = threading.Event()
        self._last_launch_s: Decimal | None = None
        self._minute, self._in_minute = -1, 0
        real_s = clock.real_s if isinstance(clock, Clock) else float
        self._processes = Processes(run_in.resolve(), grace_s, real_s, disks_die) if run_in else None
        for fault in faults:
            self.world.add(fault if isinstance(fault, Fault) else read_fault(fault))
        self._server = Server(port, self.answer, self._stated, self.leaving)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # processes are started by one thread that outlives them all
        self._threads = [threading.Thread(target=self._keep), threading.Thread(target=self._serve)]

    # --- its life ---------------------------------------------------------------------------------

    def __enter__(self) -> FakeProvider:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Every machine ends with the server."""
        self.leaving.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self.world.advance()
        self._server.server_close()

    def _stated(self) -> datetime:
        """What this provider's clock says, right or wrong."""
        return self.world.stated(self.world.at_s)

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=TICK_S)

    def _keep(self) -> None:
        try:
            while not self.leaving.wait(TICK_S):
                self.world.advance()
                if self._processes:
                    self._processes.follow(self.world)
        finally:
            if self._processes:
                self._processes.close()

    def fault(self, kind: str, **fields: Any) -> Fault:
        """Script a fault, from now on."""
        fault = read_fault({"kind": kind, **fields})
        self.world.add(fault)
        return fault

    # --- answers ----------------------------------------------------------------------------------

    def answer(self, root: str, call: Call, authorization: str) -> Answer | Silence:
        """The answer to one request, its faults included."""
        if root == "fake":
            return self._control(call)
        api = "lambda" if root == "api/v1" else "runpod"
        side = lambda_api if api == "lambda" else runpod_api
        with self.world.lock:
            self.world.advance()
            operation, about = ("balance", ()) if root == "graphql" else side.operation(call)
            self.world.requests[f"{api} {operation}"] += 1
            answer = self._spoiled(side, api, root, operation, self._names(about), call, authorization)
        if api == "runpod" and isinstance(answer, Answer):
            return replace(answer, headers={**self._quota(), **answer.headers})
        return answer

    def _spoiled(
        self,
        side: ModuleType,
        api: str,
        root: str,
        operation: str,
        names: tuple[str, ...],
        call: Call,
        authorization: str,
    ) -> Answer | Silence:
        fault = self._fault_of(api, operation, names)
        kind = fault.kind if fault else ""
        if fault and kind == "timeout":
            return Silence(fault.hold_s)
        if fault and kind in ("401", "403", "429", "500"):
            after = {"Retry-After": str(fault.retry_after_s)} if kind == "429" else {}
            refused: Answer = side.error(int(kind))
            return replace(refused, headers=after)
        if kind == "html":
            return Answer(502, "<html><body><h1>502 Bad Gateway</h1></body></html>", "text/html")
        if kind == "no_capacity":
            full: Answer = side.no_capacity()
            return full
        answer = self._honest(side, root, operation, call, authorization)
        if fault and kind == "timeout_after_create":
            return Silence(fault.hold_s)
        if kind == "500_after_create":
            failed: Answer = side.error(500)
            return failed
        if kind == "malformed":
            whole = json.dumps(answer.body if answer.body is not None else {"status": "ok"})
            return Answer(200 if answer.status == 204 else answer.status, whole[: len(whole) // 2])
        if fault and kind == "slow":
            return replace(answer, headers={**answer.headers, LATE: str(fault.hold_s)})
        return answer

    def _honest(self, side: ModuleType, root: str, operation: str, call: Call, authorization: str) -> Answer:
        if not self._knows(authorization):
            refused: Answer = side.error(401)
            return refused
        if root == "graphql":
            return runpod_api.balance(self.world, call)
        if operation == "launch" and side is lambda_api and (wait := self._launch_wait()):
            return replace(lambda_api.error(429), headers={"Retry-After": str(wait)})
        told: Answer = side.answer(self.world, self.prices, call)
        return told

    def _fault_of(self, api: str, operation: str, names: tuple[str, ...]) -> Fault | None:
        for fault in self.world.faults:
            ready = fault.kind in ANSWERS and fault.active(self.world.at_s)
            if ready and fault.matches(api, operation, names):
                return fault.fire()
        return None

    def _names(self, about: tuple[str, ...]) -> tuple[str, ...]:
        """What a request names, and the names that those machines were launched under."""
        machines = [self.world.machines[i] for i in about if i in self.world.machines]
        return (*about, *(m.name for m in machines))

    def _knows(self, authorization: str) -> bool:
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                secret = base64.b64decode(secret).decode().removesuffix(":")
            except ValueError:
                return False
        return scheme.lower() in ("bearer", "basic") and secret.strip() in self.keys

    def _launch_wait(self) -> int:
        """Lambda takes one launch in so many seconds: how long this one came too early."""
        last, now = self._last_launch_s, self.world.at_s
        if last is not None and now < last + self.launch_every_s:
            return int(last + self.launch_every_s - now) + 1
        self._last_launch_s = now
        return 0

    def _quota(self) -> dict[str, str]:
        at_s = self.world.at_s
        minute = int(at_s // 60)
        self._in_minute = self._in_minute + 1 if minute == self._minute else 1
        self._minute = minute
        left, reset_s = max(0, QUOTA - self._in_minute), 60 - int(at_s % 60)
        return {"RateLimit": f'"minute";r={left};t={reset_s}', "RateLimit-Policy": f'"minute";q={QUOTA};w=60'}

    # --- for those who rehearse -------------------------------------------------------------------

    def _control(self, call: Call) -> Answer:
        match call.method, call.parts:
            case "GET", ("state",):
                return Answer(200, self.state())
            case "POST", ("faults",):
                rows = call.body if isinstance(call.body, list) else [call.body]
                try:
                    faults = [read_fault(row) for row in rows]
                except UserError as error:
                    return Answer(400, {"error": str(error)})
                for fault in faults:
                    self.world.add(fault)
                return Answer(200, {"faults": [fault.row() for fault in faults]})
            case "DELETE", ("faults",):
                self.world.clear_faults()
                return Answer(200, {"faults": []})
            case "POST", ("reset",):
                self.world.advance()
                self.world.end_all()
                self.world.clear_faults()
                return Answer(200, self.state())
        return Answer(404, {"error": "there are: GET state, POST faults, DELETE faults, POST reset"})

    def state(self) -> dict[str, Any]:
        """The truth, whatever the faults make the APIs say."""
        world = self.world
        with world.lock:
            world.advance()
            return {
                "now": world.moment(world.at_s).isoformat().replace("+00:00", "Z"),
                "elapsed_s": str(world.at_s),
                "alive": len(world.alive()),
                "bill_usd": str(world.bill_usd()),
                "usd_per_hr": str(world.usd_per_hr()),
                "balance_usd": str(world.balance_usd()),
                "machines": [_truth(m) for m in world.machines.values()],
                "requests": dict(world.requests),
                "faults": [fault.row() for fault in world.faults],
            }


def _truth(machine: Machine) -> dict[str, Any]:
    return {
        "id": machine.id,
        "api": machine.api,
        "name": machine.name,
        "sku": machine.sku,
        "state": machine.state.value,
        "boots": machine.boots,
        "usd_per_hr": str(sum(machine.rates(), Decimal(0))),
        "bill_usd": str(machine.bill_usd()),
        "created_s": str(machine.created_s),
        "running_s": None if machine.running_s is None else str(machine.running_s),
        "gone_s": None if machine.gone_s is None else str(machine.gone_s),
    }


# --- the command ----------------------------------------------------------------------------------

Flag = typer.Option


def main(
    port: Annotated[int, Flag(help="0: any free one")] = 0,
    run_in: Annotated[Path | None, Flag(help="run what is launched, in folders below this one")] = None,
    disks_die: Annotated[
        bool, Flag("--disks-die", help="delete a machine's folder when it is lost or gone")
    ] = False,
    faults: Annotated[Path | None, Flag(help="YAML or JSON list of faults")] = None,
    gpu: Annotated[str | None, Flag(help="the GPU that --price is for [default: A100 80GB]")] = None,
    price: Annotated[str | None, Flag(help="USD per hour of one such GPU")] = None,
    balance: Annotated[str, Flag(help="prepaid USD; at 0 all machines end")] = "100",
    boot_s: Annotated[float, Flag(help="virtual seconds from launch to running")] = 30,
    term_s: Annotated[float, Flag(help="virtual seconds from terminate to gone")] = 15,
    grace_s: Annotated[float, Flag(help="virtual seconds from SIGTERM to SIGKILL")] = 10,
    launch_every_s: Annotated[float, Flag(help="Lambda's limit: one launch in so long (there: 12)")] = 0,
    port_file: Annotated[Path | None, Flag(help="write the port here once it listens")] = None,
) -> int:
    """Start a fake provider: RunPod's and Lambda's APIs, machines as processes, faults, no dollars."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    provider = FakeProvider(
        port=port,
        gpu=gpu,
        price_usd_per_hr=None if price is None else _usd("--price", price),
        balance_usd=_usd("--balance", balance),
        boot_s=boot_s,
        term_s=term_s,
        grace_s=grace_s,
        launch_every_s=launch_every_s,
        run_in=run_in,
        disks_die=disks_die,
        faults=read_faults(faults) if faults else (),
    )
    with provider:
        print(f"a fake provider listens at {provider.url}", flush=True)
        print(f"export X1_FAKE_URL={provider.url}", flush=True)
        if port_file:
            _write_port(port_file, provider.url)
        stop.wait()
    alive = len(provider.world.alive())
    left = f", {alive} still rented" if alive else ""
    print(f"the true bill: ${provider.world.bill_usd():.4f}{left}", flush=True)
    return FINISHED


def _usd(flag: str, text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite():
        raise UserError(f"{flag} {text}: expected US dollars, such as 1.19")
    return value


def _write_port(path: Path, url: str) -> None:
    """Whole or not at all: whoever waits for the file reads a port."""
    waiting = path.with_name(f"{path.name}.new")
    waiting.write_text(url.rpartition(":")[2] + "\n", encoding="utf-8")
    waiting.replace(path)


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.money.providers.fake.server"))
