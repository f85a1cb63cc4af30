"""Generators, communication hooks and optimizers' own state that no
`state_dict` holds; and no torn file."""

from __future__ import annotations

import copy
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from more_state import DIE, payloads, trained, updated
from programs import STEP, killed_once, live
from torch import nn

from harness import state
from harness.errors import UsageError
from harness.exchange.compare import differences

pytestmark = pytest.mark.usefixtures("process_as_it_was")


GENERATORS = (
    DIE
    + """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
seed = run.rank
kinds = ("PCG64", "MT19937", "Philox", "SFC64", "PCG64DXSM")
many = {kind: np.random.Generator(getattr(np.random, kind)(seed)) for kind in kinds}
t, old, r, bits = (
    torch.Generator().manual_seed(seed),
    np.random.RandomState(seed),
    random.Random(seed),
    np.random.PCG64(seed),
)
run.track(model=model, optimizer=optimizer, t=t, old=old, r=r, bits=bits, **many)
for x, y in run.batches(points(), 16, epochs=1):
    drawn = [
        torch.rand(1, generator=t).item(),
        old.standard_normal(),
        r.gauss(0, 1),
        bits.random_raw() % 7,
    ]
    for one in many.values():
        drawn += [
            one.standard_normal(),
            float(one.integers(0, 9, dtype=np.uint32)),
            one.spawn(1)[0].random(),
        ]
    loss = (model(x) * sum(drawn) - y).square().mean() * 0.001
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters() if run.world_size > 1 else ():
        torch.distributed.all_reduce(parameter.grad)
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_generators_that_are_tracked_go_on(tmp_path, ranks):
    outcome = killed_once(tmp_path, GENERATORS, ranks=ranks)
    assert outcome.killed.code == -signal.SIGKILL and outcome.is_equal, (
        outcome.rows,
        outcome.resumed.text,
    )


def test_a_generator_of_another_kind_or_none_is_refused(tmp_path):
    def make(**generators):
        def build(run):
            model = nn.Linear(8, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            run.track(model=model, optimizer=optimizer, **generators)
            return lambda x: torch.zeros(())

        return build

    trained(tmp_path / "a", make(rng=np.random.default_rng(0)), leave_at=5)
    with pytest.raises(
        UsageError,
        match=r"found: numpy.random.RandomState \(MT19937\), "
        r"expected: numpy.random.Generator \(PCG64\)",
    ):
        trained(tmp_path / "a", make(rng=np.random.RandomState(0)), leave_at=5)
    with pytest.raises(UsageError, match="holds what is not tracked: rng"):
        trained(tmp_path / "a", make(), leave_at=5)
    with pytest.raises(UsageError, match="SystemRandom without state_dict"):
        trained(tmp_path / "b", make(rng=random.SystemRandom()))


POWER = (
    DIE
    + """
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
run = init()
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1)))
state = powerSGD_hook.PowerSGDState(
    None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
)
model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):"""
    + STEP
)


def test_the_state_of_a_communication_hook_is_each_ranks_own(tmp_path):
    outcome = killed_once(tmp_path, POWER, ranks=2)
    assert outcome.killed.code == -signal.SIGKILL and outcome.is_equal, (
        outcome.rows,
        outcome.resumed.text,
    )
    one, other = (
        entry["hooks"]["model: powerSGD_hook 0.0"]["error_dict"]
        for entry in payloads(tmp_path / "killed")[6]["own"]
    )
    assert one and not torch.equal(*(next(iter(errors.values())) for errors in (one, other)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            "post_localSGD_hook.PostLocalSGDState(None, None, 1)",
            "groups of ranks train weights of their own",
        ),
        ("type('State', (), {})()", "finished"),
        ("late", "was registered after track"),
        (
            "setattr(odd := type('State', (), {})(), 'inner', object()) or odd",
            "cannot be saved: model: hook 0.0, inner",
        ),
    ],
)
def test_a_hook_whose_state_cannot_be_kept_is_refused_at_track(tmp_path, state, words):
    hook = """
def hook(state, bucket):
    return (
        torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        .get_future()
        .then(lambda done: done.value()[0])
    )
"""
    source = POWER.replace("import powerSGD_hook", f"import post_localSGD_hook{hook}")
    begin, end = source.index("state = power"), source.index("optimizer =")
    register = f"model.register_comm_hook({state}, hook)"
    if state == "late":
        register, source = (
            "",
            source.replace(
                "for x, y in",
                "model.register_comm_hook(type('State', (), {})(), hook)\nfor x, y in",
            ),
        )
    lived = live(tmp_path, f"{source[:begin]}{register}\n{source[end:]}", "a", ranks=2)
    assert words in lived.text


def swap_values(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        kept = own.data.clone()
        own.data.copy_(other.data)
        other.data.copy_(kept)


def swap_tensors(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        own.data, other.data = other.data, own.data


def reset(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(model.parameters(), average.parameters(), strict=True):
        own.data.lerp_(other.data, 0.5)


def average_later(model: nn.Module, average: nn.Module) -> None:
    for own, other in zip(average.parameters(), model.parameters(), strict=True):
        own.data.mul_(0.9).add_(other.data, alpha=0.1)


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, width), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x))


@pytest.mark.parametrize("width", [8, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("at_head", "undo"),
    [
        (swap_values, swap_values),
        (swap_tensors, swap_tensors),
        (swap_tensors, None),
        (reset, None),
        (average_later, None),
    ],
)
def test_no_file_is_torn_by_what_is_written_behind_pytorchs_back(tmp_path, width, at_head, undo):
    """At the loop's head, and not before the first save: then it is another state than that of the
    boundary before."""
    seen: dict[int, dict] = {}

    def make(run):
        model, average = Two(width), Two(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / width, momentum=0.9)
        run.track(model=model, optimizer=optimizer, average=average)

        def step(x):
            seen[run.step - 1] = copy.deepcopy(state.capture(run.tracked))
            if run.step >= 5:
                at_head(model, average)
                if undo:
                    undo(model, average)
            return updated(model, optimizer, x)

        return step

    trained(tmp_path / "a", make, save_every_steps=2)
    saved = payloads(tmp_path / "a")
    assert {2, 12} <= set(saved) and len(saved) >= 5
    for number, payload in saved.items():
        if number in seen:
            assert (
                list(differences({name: payload[name] for name in seen[number]}, seen[number]))
                == []
            ), number


LOOP_OF_TWO_EPOCHS = """
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""


OWN_OPTIMIZER = (
    """
run = init()
torch.manual_seed(0)
class Own(torch.optim.SGD):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.steps, self._seen, self.warm = 0, torch.zeros(3), {"lr": 0.1}
    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self._seen += 1
        self.warm["lr"] *= 0.9
        for group in self.param_groups:
            group["lr"] = self.warm["lr"] / self.steps / self._seen[0].item()
        return super().step(closure)
model = nn.Linear(8, 1)
optimizer = Own(model.parameters(), lr=0.1)
"""
    + LOOP_OF_TWO_EPOCHS
)


OWN_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rng, self.others = (
            nn.Linear(8, 1),
            torch.Generator().manual_seed(3),
            [np.random.default_rng(0)],
        )
        self.unused = random.Random(3)
    def forward(self, x):
        return self.inner(
            x + torch.randn(x.shape, generator=self.rng) + float(self.others[0].normal())
        )
class Langevin(torch.optim.SGD):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.rng = torch.Generator().manual_seed(0)
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=self.rng))
model = nn.Sequential(Noisy())
optimizer = Langevin(model.parameters(), lr=0.1)
"""
    + LOOP_OF_TWO_EPOCHS
)


LATE_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noise:
    def __init__(self):
        self.words = {str(number): [number] * 1000 for number in range(900)}
        self.by = {"rng": np.random.default_rng(0)}
def normal():
    g = torch.Generator().manual_seed(0)
    return lambda: torch.randn((), generator=g).item()
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.rng, self.noise, self.others = nn.Linear(8, 1), None, Noise(), {}
        self.draw, self.more = normal(), []
    def forward(self, x):
        if self.rng is None:
            self.rng = torch.Generator().manual_seed(3)
        if "b" not in self.others:
            self.others["b"] = random.Random(3)
        if not self.more:
            self.more.append(np.random.RandomState(0))
        drawn = self.noise.by["rng"].normal() + self.others["b"].random() + self.draw()
        return self.inner(
            x + torch.randn(x.shape, generator=self.rng) + drawn + self.more[0].normal()
        )
model = nn.Sequential(Noisy())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
"""
    + LOOP_OF_TWO_EPOCHS
)


HIDDEN_GENERATORS = (
    """
run = init()
torch.manual_seed(0)
class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.rng = torch.Generator().manual_seed(3)
    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.rng)
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.first = nn.Linear(8, 1), Noise()
        self.noise, self.same = [nn.Sequential(Noise())], [self.inner, self, self.first]
    def forward(self, x):
        return self.inner(self.noise[0](self.first(x)))
model = Noisy()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
"""
    + LOOP_OF_TWO_EPOCHS
)


@pytest.mark.parametrize(
    "source",
    [OWN_OPTIMIZER, OWN_GENERATORS, LATE_GENERATORS, HIDDEN_GENERATORS],
    ids=[
        "attributes of an optimizer",
        "generators of modules and optimizers",
        "generators that are made late, or lie in objects of the program",
        "generators of modules in a list",
    ],
)
def test_what_no_state_dict_tells_of_goes_on(tmp_path, source):
    outcome = killed_once(tmp_path, source)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    assert "warning" not in outcome.whole.text + outcome.resumed.text


def test_generators_of_modules_are_each_ranks_own_and_those_that_nobody_draws_from_are_not_kept(
    tmp_path,
):
    source = OWN_GENERATORS.replace("manual_seed(3)", "manual_seed(3 + run.rank)").replace(
        "default_rng(0)", "default_rng(run.rank)"
    )
    source = source.replace(
        "nn.Sequential(Noisy())", "nn.parallel.DistributedDataParallel(nn.Sequential(Noisy()))"
    )
    outcome = killed_once(tmp_path, source, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    kept = [own["generators"] for own in payloads(tmp_path / "killed")[18]["own"]]
    assert [set(of) for of in kept] == [{"model.0.rng", "model.0.others[0]", "optimizer.rng"}] * 2


class Noise:
    """Not a module, and made by the first forward pass."""

    def __init__(self):
        self.rng = np.random.default_rng(0)


class Held(dict):
    """A container that is not searched."""


class Late(nn.Linear):
    noise: Noise | None = None

    held: Held

    def forward(self, x):
        self.noise = self.noise or Noise()
        return super().forward(x) + self.noise.rng.normal() + self.held["rng"].random()


def test_generators_that_cannot_be_kept_are_named(tmp_path, capsys):
    def make(run):
        model = Late(8, 1)
        model.held = Held(rng=random.Random(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.track(model=model, optimizer=optimizer)
        return lambda x: updated(model, optimizer, x)

    trained(tmp_path / "a", make, leave_at=5)
    said = capsys.readouterr().out
    assert said.count("warning: model.held changes in training, and is not saved") == 1
    assert said.count("changes in training") == 1
    trained(tmp_path / "a", make, leave_at=5)
    assert (
        "warning: the generator model.noise.rng is not there when training begins, "
        "so its state is lost" in capsys.readouterr().out
    )
