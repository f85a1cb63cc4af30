"""Programs that people have written, each killed once: they end as the ones that were not, or are
refused in words."""

from __future__ import annotations

import signal

import pytest
from programs import STEP, killed_once, live

PLAIN = (
    """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):"""
    + STEP
)


def test_a_plain_loop_ends_as_the_one_that_was_not_killed(tmp_path):
    outcome = killed_once(tmp_path, PLAIN)
    assert outcome.killed.code == -signal.SIGKILL
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


COUNTED = {
    "in the run": "for i, (x, y) in run.enumerate(run.batches(points(), 16, epochs=3), 1):",
    "in the epoch": """
for epoch, batches in run.by_epoch(run.batches(points(), 16, epochs=3)):
  for i, (x, y) in run.enumerate(batches):""",
    "in the epoch of a stream, in micro-batches": """
for epoch, batches in run.by_epoch(run.batches(Numbers(), 16, epochs=3, accumulate=2)):
  for i, ((x, y), more) in run.enumerate(batches):""",
}
STREAM = """
class Numbers(IterableDataset):
    at = 0
    def __iter__(self):
        while self.at < 160:
            self.at += 1
            yield torch.full((8,), self.at / 160), torch.ones(1)
        self.at = 0
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
"""


@pytest.mark.parametrize("loop", COUNTED)
def test_what_the_run_enumerates_goes_on(loop, tmp_path):
    step = STEP.replace(
        "\n    opt", "\n    optimizer.param_groups[0]['lr'] = 0.05 / (1 + i)\n    opt", 1
    )
    step += "    run.state.setdefault('numbers', []).append(i)\n    assert run.batch in (i, i - 1)"
    head, _, _ = PLAIN.partition("for x, y")
    source = STREAM + head + COUNTED[loop] + step
    outcome = killed_once(tmp_path, source + "\nprint(run.state['numbers'])", die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    numbers = [*range(1, 31)] if loop == "in the run" else [*range(10)] * 3
    assert str(numbers) in outcome.resumed.text, outcome.resumed.text
    assert "begins anew" not in outcome.whole.text


def test_on_two_ranks_too(tmp_path):
    outcome = killed_once(
        tmp_path,
        PLAIN.replace("nn.Linear(8, 1)", "nn.parallel.DistributedDataParallel(nn.Linear(8, 1))"),
        ranks=2,
    )
    assert outcome.killed.codes == [-signal.SIGKILL] * 2
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


@pytest.mark.parametrize(
    "made", ["nn.Parameter(torch.zeros(1))", "torch.zeros(1, requires_grad=True)"]
)
def test_a_parameter_that_no_module_holds_goes_on_as_the_refusal_of_it_says(tmp_path, made):
    source = (
        PLAIN.replace("optimizer =", f"log_sigma = {made}\noptimizer =")
        .replace("model.parameters()", "[*model.parameters(), log_sigma]")
        .replace("run.track(", "run.track(own=torch.nn.ParameterList([log_sigma]), ")
        .replace(".mean()", ".mean() * log_sigma.exp() - log_sigma")
    )
    outcome = killed_once(tmp_path, source)
    assert "resumes from step 6" in outcome.resumed.text and "warning" not in outcome.whole.text
    assert outcome.is_equal, outcome.rows


def epochs(head: str, before: str = "", model: str = "nn.Linear(8, 1)") -> str:
    """A program with a loop over epochs whose outer loop begins with these lines."""
    lines = "\n".join(f"    {line}" for line in head.splitlines())
    return f"""
run = init()
model = {model}
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
{before}
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
group = optimizer.param_groups[0]
for epoch, batches in run.by_epoch(run.batches(points(), 16, epochs=3)):
{lines}
    for x, y in batches:
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.state["lr"] = group["lr"]
        run.log(loss=loss)
        die(run)
"""


DROPOUT = "nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))"
HEADS = {
    "draws from the generators": "torch.rand(3), np.random.rand(), random.random()",
    "lowers the learning rate": 'for each in optimizer.param_groups:\n    each["lr"] *= 0.9',
    "steps the schedule": "optimizer.step()\nscheduler.step()",
    "counts in the state": """
run.state["heads"] = run.state.get("heads", 0) + 1
run.state.setdefault("seen", []).append(epoch)""",
    "clears the momentum": "optimizer.state.clear()",
    "perturbs the weights": "with torch.no_grad():\n    model[0].weight.mul_(0.9)",
    "leaves gradients": "model(torch.ones(1, 8)).sum().backward()",
    "changes an attribute": "model[1].p *= 0.9\nmodel.heads = getattr(model, 'heads', 0) + 1",
    "evaluates": "run.evaluate(points(), lambda batch: {'loss': model(batch[0]).sum()})",
}


@pytest.mark.parametrize("head", HEADS)
def test_what_an_epoch_begins_with_is_not_applied_again_where_a_run_resumes_inside_it(
    head, tmp_path
):
    outcome = killed_once(tmp_path, epochs(HEADS[head], model=DROPOUT), die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


@pytest.mark.parametrize(
    ("head", "used", "name"),
    [
        (
            "old = copy.deepcopy(model)",
            "(model.weight - old.weight.detach()).square().sum()",
            "old",
        ),
        ("scale = 1 + model.weight.detach().norm().item()", "model.bias.sum() * scale", "scale"),
        (
            "old = {'w': model.weight.detach().clone()}",
            "(model.weight - old['w']).square().sum()",
            "old['w']",
        ),
        # As when the epoch began, or of no use: draws, clocks, what is tracked, shown at the end.
        ("noise, at = torch.randn(8), time.time()", "(model.weight * noise).sum() + 0 * at", ""),
        ("own = list(model.parameters())", "own[0].sum()", ""),
        ("rate = 0.5 ** epoch", "model.bias.sum() * rate", ""),
        ("norm = model.weight.detach().norm().item(); print(norm)", "0", ""),
    ],
)
def test_what_an_epoch_takes_from_the_model_is_named_where_a_resume_takes_it_anew(
    tmp_path, head, used, name
):
    source = epochs(head, "import copy").replace(".mean()", f".mean() + {used}")
    outcome = killed_once(tmp_path, source, die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert "not as when" not in outcome.whole.text + outcome.killed.text
    named = [line for line in outcome.resumed.text.splitlines() if "not as when" in line]
    assert len(named) == bool(name), outcome.resumed.text
    assert all(f"program.py: {name}. Where" in line for line in named)
    assert outcome.is_equal == (not name), outcome.rows


def test_what_an_epoch_takes_from_the_model_goes_on_in_a_tracked_copy_and_in_the_state(tmp_path):
    head = """
old.load_state_dict(model.state_dict())
run.state["scale"] = 1 / (1 + model.weight.detach().norm().item())
"""
    source = epochs(head, "import copy\nold = copy.deepcopy(model)\n")
    source = source.replace("scheduler=scheduler)", "scheduler=scheduler, old=old)").replace(
        ".mean()",
        ".mean() * run.state['scale'] + (model.weight - old.weight.detach()).square().sum()",
    )
    outcome = killed_once(tmp_path, source, die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_a_generator_of_the_program_that_an_epoch_begins_with_is_put_back(tmp_path):
    source = epochs("torch.randn(3, generator=own)", "own = torch.Generator().manual_seed(5)")
    outcome = killed_once(tmp_path, source.replace("run.track(", "run.track(own=own, "), die=18)
    assert outcome.is_equal, outcome.rows


DRAWN = """
sizes = [random.random(), np.random.rand(), torch.rand(1).item()] + [
    torch.rand(1, generator=own).item(), mine.random(), model[1].rng.random(), data.rng.random()
]"""
OWN = """
class Data(Dataset):
    def __init__(self):
        self.rng, self.of = np.random.default_rng(5), points()
    def __len__(self):
        return 160
    def __getitem__(self, number):
        x, y = self.of[number]
        return x + self.rng.random(), y
data = Data()
own, mine = torch.Generator().manual_seed(5), np.random.default_rng(5)
model[1].rng = random.Random(5)"""
MIXED = """
def mixed(batches):
    for x, y in batches:
        yield x * torch.rand(1), y"""


def drawn(before: str = "") -> str:
    return (
        epochs(DRAWN, OWN + before, model=DROPOUT)
        .replace("run.track(", "run.track(own=own, mine=mine, ")
        .replace("model(x)", "model(x * sum(sizes) / 7)")
        .replace("batches(points()", "batches(data")
    )


@pytest.mark.parametrize(("first", "die"), [(14, 17), (18, 27)])
def test_what_an_epoch_begins_with_draws_the_same_again_where_a_run_resumes_inside_it(
    first, die, tmp_path
):
    live(tmp_path, drawn(), "killed", env={"DIE": str(first)})
    outcome = killed_once(tmp_path, drawn(), die=die)
    assert f"resumes from step {(die - 1) // 3 * 3}" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert "warning" not in outcome.resumed.text


def test_so_it_does_behind_an_iterator_of_the_program_and_on_each_rank(tmp_path):
    source = drawn(MIXED).replace("by_epoch(run", "by_epoch(mixed(run").replace("=3)):", "=3))):")
    outcome = killed_once(tmp_path, source, die=18, ranks=2)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_a_head_that_draws_only_where_a_run_resumes_is_warned(tmp_path):
    head = "if 'NEW' in os.environ: random.random()"
    outcome = killed_once(tmp_path, epochs(head), die=18, then={"NEW": "1"})
    assert outcome.resumed.text.count("draws random numbers before its inner loop") == 1


def test_what_one_rank_begins_an_epoch_with_is_put_back_on_all(tmp_path):
    head = """
if run.rank == 0:
    model.module[1].running_mean += 1
run.state["heads"] = run.state.get("heads", 0) + 1 + run.rank
torch.rand(1 + run.rank)"""
    model = "nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))"
    source = epochs(head, model=f"nn.parallel.DistributedDataParallel({model})")
    outcome = killed_once(tmp_path, source, die=18, ranks=2)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_what_refers_to_parts_of_the_state_sees_what_is_put_back(tmp_path):
    source = epochs(HEADS["counts in the state"] + "\nseen = run.state['seen']")
    source = source.replace("run.log(loss", "seen.append(run.step)\n        run.log(loss")
    outcome = killed_once(tmp_path, source, die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_a_setting_that_is_overridden_stays_so_where_the_state_is_put_back(tmp_path):
    source = (
        epochs(HEADS["lowers the learning rate"])
        .replace("init()", "init(override=[os.environ['NEW']] if 'NEW' in os.environ else [])")
        .replace("momentum=0.9", "momentum=float(os.environ.get('MOMENTUM', 0.9))")
    )
    then = {"NEW": "optimizer", "MOMENTUM": "0.5"}
    outcome = killed_once(tmp_path, source, die=18, then=then)
    assert outcome.resumed.code == 0, outcome.resumed.text
    rows = [row for row in outcome.rows if "momentum" in row[0]]
    assert "momentum: 0.9 -> 0.5" in outcome.resumed.text and rows, outcome.rows
    assert outcome.resumed.text.count("overridden") == 1, outcome.resumed.text


def test_what_a_stream_begins_an_epoch_with_is_not_applied_again(tmp_path):
    source = STREAM + epochs(HEADS["lowers the learning rate"]).replace("points()", "Numbers()")
    outcome = killed_once(tmp_path, source, die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_an_object_that_an_epoch_does_not_change_is_not_loaded_again(tmp_path):
    loads = """
class Counter:
    loads = 0
    def state_dict(self):
        return {"value": 1}
    def load_state_dict(self, state):
        self.loads += 1
"""
    source = loads + epochs(HEADS["lowers the learning rate"], "counter = Counter()")
    source = source.replace("run.track(", "run.track(counter=counter, ")
    outcome = killed_once(tmp_path, source + "\nprint('loads:', counter.loads)\n", die=18)
    assert outcome.is_equal, outcome.rows
    assert "loads: 1" in outcome.resumed.text


VALIDATION = """
for each in validation:
    for x, y in each:
        pass
torch.rand(1)"""


def test_persistent_workers_of_a_validation_draw_no_number_more_after_a_restart(tmp_path):
    before = """
class Eager(Sampler):
    def __iter__(self):
        return iter([int(torch.randint(20, (1,))), random.randrange(20)])
own = torch.Generator()
options = [{}, {"generator": own}, {"shuffle": True}, {"sampler": Eager()}]
workers = dict(num_workers=1, persistent_workers=True)
validation = [DataLoader(points(20), 20, **each, **workers) for each in options]
validation.append(DataLoader(points(20), 20, shuffle=True))
"""
    source = epochs("pass", before, DROPOUT).replace("run.track(", "run.track(own=own, ")
    tail = "\n".join(f"    {line}" for line in VALIDATION.splitlines())
    outcome = killed_once(tmp_path, source + tail, die=18)
    assert "resumes from step 15" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


PREFETCHER = """
class Prefetcher:  # as those that copy a batch to the GPU ahead of its use
    def __init__(self, batches):
        self.batches = batches
        self.ahead = next(batches)
    def __iter__(self):
        while self.ahead is not None:
            now, self.ahead = self.ahead, next(self.batches, None)
            yield now
"""
BACKGROUND = """
import queue, threading
class Prefetcher(threading.Thread):
    def __init__(self, batches):
        super().__init__(daemon=True)
        self.batches, self.queue = batches, queue.Queue(2)
        self.start()
    def run(self):
        for batch in self.batches:
            self.queue.put(batch)
    def __iter__(self):
        while True:
            yield self.queue.get()
"""
AHEAD = "the second batch was requested before the first one was trained on"


def test_a_loop_that_requests_batches_ahead_in_another_thread_is_refused(tmp_path):
    lived = live(
        tmp_path,
        BACKGROUND
        + PLAIN.replace("run.batches(", "Prefetcher(run.batches(").replace(
            "epochs=2):", "epochs=2)):"
        ),
        "run",
        limit_s=60,
    )
    assert lived.code == 78 and "Traceback" not in lived.text, lived.text
    assert "another thread than the one of harness.init" in lived.text, lived.text
    assert not (tmp_path / "run" / "attempts").exists()


def test_a_loop_that_requests_batches_ahead_is_warned_once(tmp_path):
    source = PREFETCHER + PLAIN.replace("run.batches(", "Prefetcher(run.batches(")
    lived = live(tmp_path, source.replace("epochs=2):", "epochs=2)):"), "run")
    assert lived.text.count(AHEAD) == 1, lived.text


STEP_BY_HAND = """
    (model(x) - y).square().mean().backward()
    if run.step % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize("step", [STEP, STEP_BY_HAND], ids=["a step", "accumulates"])
def test_a_loop_that_trains_on_each_batch_before_the_next_is_not_warned(step, tmp_path):
    lived = live(tmp_path, PLAIN.replace(STEP, step), "run")
    assert lived.code == 0 and AHEAD not in lived.text, lived.text
