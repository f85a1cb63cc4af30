"""How samples are dealt out, epoch by epoch: as a plain DataLoader's loop would have it, and the
same after a kill."""

from __future__ import annotations

import re
import signal

import pytest
from programs import killed_once, live

TRAIN = """
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    die(run)
"""
BEGIN = """
run = init()
torch.manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
"""

# Each batch holds the epoch that the dataset believes in; a plain DataLoader's are printed first.
TOLD = """
class Told(Dataset):
    def __init__(self):
        self.epoch, self.level = -1, -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return torch.full((8,), index / 48), torch.tensor([float(self.epoch), float(self.level)])


def line(name, seen):
    print(name, *(f"{epoch:.0f}:{level:.0f}" for epoch, level in seen), flush=True)


workers, persistent = WORKERS
options = dict(batch_size=16, num_workers=workers, persistent_workers=persistent)
data = Told()
plain = DataLoader(data, **options)
seen = []
for epoch in range(3):
    data.set_epoch(epoch)
    data.level = 10 * epoch
    seen += [y[0].tolist() for x, y in plain]
line("plain", seen)
del plain
data = Told()
""" + BEGIN + """
seen = []
for epoch, batches in run.by_epoch(run.batches(DataLoader(data, **options), epochs=3)):
    data.set_epoch(epoch)
    data.level = 10 * epoch
    assert len(batches) == 3
    for x, y in batches:
        seen.append(y[0].tolist())
        loss = (model(x) - y[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        die(run)
line("ours", seen)
"""  # fmt: skip


def said(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_told_of_before_its_first_sample_is_loaded_as_with_a_plain_loader(
    workers, tmp_path
):
    outcome = killed_once(tmp_path, TOLD.replace("WORKERS", f"{workers}, False"), die=5)
    assert (
        said(outcome.whole.text, "ours")
        == said(outcome.whole.text, "plain")
        == ["0:0"] * 3 + ["1:10"] * 3 + ["2:20"] * 3
    )
    assert said(outcome.resumed.text, "ours") == ["1:10"] * 3 + ["2:20"] * 3
    assert outcome.killed.code == -signal.SIGKILL and outcome.is_equal, outcome.rows


def test_workers_that_outlive_an_epoch_are_told_of_the_next_one(tmp_path):
    outcome = killed_once(tmp_path, TOLD.replace("WORKERS", "2, True"), die=5)
    assert [told.partition(":")[0] for told in said(outcome.whole.text, "ours")] == [*"000111222"]
    assert outcome.is_equal, outcome.rows


FLAT = TOLD.partition("workers, persistent")[0] + BEGIN + """
seen = []
from torch.utils.data import Subset
for x, y in run.batches(Subset(Told(), range(40)), 16, epochs=3, num_workers=WORKERS):
    seen.append(y[0].tolist())
    loss = (model(x) - y[:, :1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    die(run)
line("ours", seen)
"""  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_in_one_loop_over_all_epochs_the_dataset_is_told_where_it_is_loaded(workers, tmp_path):
    outcome = killed_once(tmp_path, FLAT.replace("WORKERS", str(workers)), die=5)
    assert said(outcome.whole.text, "ours") == ["0:-1"] * 2 + ["1:-1"] * 2 + ["2:-1"] * 2
    assert outcome.is_equal, outcome.rows


OPENS = """
class Opens(Dataset):
    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 3000

    def __getitem__(self, index):
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)
            with open(self.path + ".opened", "a") as log:
                log.write(f"{os.getpid() == parent}\\n")
        self.file.seek(8 * index)
        time.sleep(0)
        return torch.tensor(np.frombuffer(self.file.read(8), dtype=np.int64).copy()), index


parent = os.getpid()
path = sys.argv[1] + ".bin"
np.arange(3000, dtype=np.int64).tofile(path)
""" + BEGIN.replace("8, 1", "1, 1") + """
wrong = 0
def over():
    batches = run.batches(DataLoader(Opens(path), 20, shuffle=True, num_workers=2), epochs=1)
    if LOOP == "flat":
        yield from batches
    else:
        for _, inner in run.by_epoch(batches):
            yield from inner
for x, index in over():
    wrong += int((x[:, 0] != index).sum())
    loss = model(x.float() / 3000).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("wrong", wrong, flush=True)
"""  # fmt: skip


@pytest.mark.parametrize("loop", ["flat", "nested"])
def test_a_dataset_with_workers_is_never_asked_for_a_sample_in_the_process_that_they_are_forked_from(  # noqa: E501
    loop, tmp_path
):
    lived = live(tmp_path, OPENS.replace("LOOP", f"'{loop}'"), "whole")
    assert lived.code == 0, lived.text
    assert said(lived.text, "wrong") == ["0"]
    opened = (tmp_path / "whole.bin.opened").read_text().split()
    assert set(opened) == {"False"} and len(opened) == (2 if loop == "flat" else 3)


ELSEWHERE = (
    OPENS[: OPENS.index("wrong = 0")]
    + """
def loader(shuffle):
    return DataLoader(Opens(path), 20, shuffle=shuffle, num_workers=2)

def wrong_in(batch):
    return {"wrong": (batch[0][:, 0] != batch[1]).sum()}

wrong = 0
for x, more in run.batches(loader(True), epochs=1, beside={"more": loader(True)}):
    wrong += int(wrong_in(x)["wrong"]) + int(wrong_in(more["more"])["wrong"])
    loss = model(x[0].float() / 3000).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if run.step == 5:
        wrong += int(run.evaluate(loader(False), wrong_in)["wrong"] * 3000)
    die(run)
print("wrong", wrong, flush=True)
"""
)


def test_nor_is_one_beside_it_or_one_of_an_evaluation(tmp_path):
    """In a second life neither."""
    killed = live(tmp_path, ELSEWHERE, "run", env={"DIE": "9"})
    resumed = live(tmp_path, ELSEWHERE, "run")
    assert (killed.code, resumed.code) == (-9, 0), resumed.text
    assert said(resumed.text, "wrong") == ["0"]
    assert set((tmp_path / "run.bin.opened").read_text().split()) == {"False"}


SCHEDULED = """
run = init()
torch.manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batches = run.batches(points(), 16, epochs=3, max_steps=LIMIT)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
print("length", len(batches), flush=True)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
for x, y in batches:
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    die(run)
"""


@pytest.mark.parametrize(("limit", "length"), [(None, "30"), (17, "17")])
def test_the_length_is_that_of_the_whole_run_in_each_life(limit, length, tmp_path):
    outcome = killed_once(tmp_path, SCHEDULED.replace("LIMIT", str(limit)))
    assert said(outcome.whole.text, "length") == said(outcome.resumed.text, "length") == [length]
    assert outcome.is_equal, outcome.rows


LOADED = (
    BEGIN
    + """
class Marked(Dataset):
    data = points(40)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return *self.data[index], index


data = Marked()
SAMPLER
used = []
for epoch, batches in run.by_epoch(run.batches(DataLoader(data, 4, sampler=sampler), epochs=3)):
    HEAD
    for x, y, index in batches:
        used += [(epoch, int(i)) for i in index]
        losses = (model(x) - y).square()[:, 0]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        STEP
        die(run)
print("used", *(f"{epoch}:{index}" for epoch, index in used), flush=True)
"""
)
OWN = """
class Own(Sampler):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return 40

    def __iter__(self):
        return iter(torch.randperm(40, generator=self.generator).tolist())

sampler = Own()
"""
NUMPY = OWN.replace("torch.Generator().manual_seed(5)", "np.random.default_rng(5)").replace(
    "torch.randperm(40, generator=self.generator)", "self.generator.permutation(40)"
)
COUNTS = (
    OWN.replace("self.generator = torch.Generator().manual_seed(5)", "self.count = 0")
    .replace("        return iter(", "        self.count += 1\n        return iter(")
    .replace("generator=self.generator", "generator=torch.Generator().manual_seed(self.count)")
)
WEIGHTED = (
    "sampler = torch.utils.data.WeightedRandomSampler(torch.ones(40), 40, generator=GENERATOR)"
)
REPEATED = (
    "sampler = torch.utils.data.RandomSampler("
    "data, True, 40, generator=torch.Generator().manual_seed(3))"
)
SCORED = """
class Scored(Sampler):
    def __len__(self):
        return 40

    def __iter__(self):
        with torch.no_grad():
            return iter(
                (model(data.data.tensors[0]) - data.data.tensors[1])
                .square()[:, 0]
                .argsort()
                .tolist()
            )

sampler = Scored()
"""
BY_EPOCH = (
    OWN.replace("self.generator = torch.Generator().manual_seed(5)", "self.epoch = 0").replace(
        "generator=self.generator", "generator=torch.Generator().manual_seed(self.epoch)"
    )
    + "Own.set_epoch = lambda self, epoch: setattr(self, 'epoch', epoch)\n"
)
LAZY = OWN.replace("self.generator = torch", "self.order = self.generator = None  # torch").replace(
    "        return iter(torch.randperm(40, generator=self.generator).tolist())",
    """        if self.generator is None:
            self.generator = MADE
        self.order = np.array(torch.randperm(40, generator=torch.Generator().manual_seed(DRAWN)))
        return iter(self.order.tolist())""",
)
LAZY_TORCH = LAZY.replace("MADE", "torch.Generator().manual_seed(5)").replace(
    "DRAWN", "int(torch.randint(99, (), generator=self.generator))"
)
LAZY_NUMPY = LAZY.replace("MADE", "np.random.default_rng(5)").replace(
    "DRAWN", "int(self.generator.integers(99))"
)
LAZY_PYTHON = LAZY.replace("MADE", "random.Random(5)").replace(
    "DRAWN", "self.generator.randrange(99)"
)
CONTAINERS = """
from collections import Counter, OrderedDict, defaultdict, deque
hard, counts, recent, done = OrderedDict(at=[1]), Counter(), deque([0], maxlen=3), {0}

class Hard(Sampler):
    def __init__(self):
        self.hard, self.counts, self.recent, self.done = hard, counts, recent, done
        self.seen = defaultdict(int)

    def __len__(self):
        return 40

    def __iter__(self):
        self.seen[len(hard["at"]) % 3] += 1
        self.counts.update(self.seen)
        self.hard.move_to_end("at")
        numbers = [*self.hard["at"], *self.counts.elements(), *self.recent, *sorted(self.done)]
        seed = sum(at * number for at, number in enumerate(numbers))
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist())

sampler = Hard()
"""
MINE = 'mine = int(index[0]); hard["at"].append(mine); recent.append(mine); done.add(mine)'
SCORE = (
    "sampler.weights = torch.rand(40, generator=torch.Generator().manual_seed("
    "int(1e6 * model.bias.item()) % 1000)).double()"
)


def program(sampler: str, head: str = "pass", step: str = "pass") -> str:
    return LOADED.replace("SAMPLER", sampler).replace("HEAD", head).replace("STEP", step)


@pytest.mark.parametrize(
    ("source", "stays"),
    [
        (program(OWN), True),
        (program(NUMPY), True),
        (program(COUNTS), True),
        (program(LAZY_TORCH), True),
        (program(LAZY_NUMPY), True),
        (program(LAZY_PYTHON), True),
        (program(REPEATED), True),
        (program(WEIGHTED.replace("GENERATOR", "torch.Generator().manual_seed(3)")), True),
        (
            program(
                WEIGHTED.replace("GENERATOR", "None"),
                step="sampler.weights[index] = losses.detach().double() + 0.01",
            ),
            True,
        ),
        (program(WEIGHTED.replace("GENERATOR", "None"), head=SCORE), True),
        (program(CONTAINERS, step=MINE), True),
        (program(SCORED), False),
        (program(WEIGHTED.replace("GENERATOR", "None")), False),
        (program(BY_EPOCH, head="sampler.set_epoch(epoch)"), False),
    ],
    ids=[
        "its own generator",
        "of numpy",
        "counts",
        "made when asked",
        "so of numpy",
        "so of python",
        "with replacement",
        "weighted with a generator",
        "weights of the losses",
        "weights set each epoch",
        "containers that the loop shares",
        "by the model",
        "weighted",
        "by the epoch",
    ],
)
def test_an_epoch_goes_on_in_the_order_in_which_it_began_and_the_next_ones_as_they_would_have(
    source, stays, tmp_path
):
    from library_runs import newest

    # Step 15 is saved, in the middle of the second epoch.
    outcome = killed_once(tmp_path, source, die=18)
    assert (
        outcome.killed.code == -signal.SIGKILL and outcome.whole.code == outcome.resumed.code == 0
    ), outcome.resumed.text
    whole, rest = said(outcome.whole.text, "used"), said(outcome.resumed.text, "used")
    assert len(rest) == 60 and rest == whole[60:]
    assert outcome.is_equal, outcome.rows
    assert ("kinds" in newest(tmp_path / "killed")["data"]) == stays, (
        "at the end no order is left, but maybe state of the sampler"
    )


SKEWED = """
class Skewed(Sampler):
    def __init__(self):
        self.skew, self.generator = 1.0, torch.Generator().manual_seed(5)

    def __len__(self):
        return 40

    def __iter__(self):
        drawn = torch.randperm(40, generator=self.generator) / 40
        skew = self.skew + getattr(self, "more", 0.0)
        return iter((drawn - skew * torch.arange(40).remainder(7)).argsort().tolist())

sampler = Skewed()
"""
MORE = """
run = init()
torch.manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
used = []
more = {"more": DataLoader(TensorDataset(torch.arange(40)), 4, sampler=sampler)}
for epoch, batches in run.by_epoch(run.batches(points(40), 4, epochs=4, beside=more)):
    HEAD
    for (x, y), also in batches:
        used += also["more"][0].tolist()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        die(run)
print("used", *used, flush=True)
"""
HEADS = {
    "changes an attribute": "sampler.skew *= 1.5",
    "draws from its generator": "torch.rand(3, generator=sampler.generator)",
    "adds an attribute": "sampler.more = getattr(sampler, 'more', 0.5) * 1.5",
}


@pytest.mark.parametrize(
    ("head", "where", "wrapped"),
    [
        *((head, "main", False) for head in HEADS),
        ("changes an attribute", "beside", False),
        ("changes an attribute", "main", True),
    ],
)
def test_what_an_epoch_begins_with_is_not_applied_again_to_a_sampler(
    head, where, wrapped, tmp_path
):
    if where == "main":
        source = program(SKEWED, head=HEADS[head]).replace("epochs=3", "epochs=4")
    else:
        source = SKEWED + MORE.replace("HEAD", HEADS[head])
    if wrapped:  # as by tqdm: the first batch of an epoch is loaded before the head of the loop
        source = source.replace("run.by_epoch(run", "run.by_epoch(b for b in run")
    outcome = killed_once(tmp_path, source, die=18)
    assert "resumes from step 15" in outcome.resumed.text, outcome.resumed.text
    whole, rest = said(outcome.whole.text, "used"), said(outcome.resumed.text, "used")
    assert len(set(whole)) > 1 and rest == whole[60:]
    assert outcome.is_equal, outcome.rows


ORDERED = (
    BEGIN
    + """
data = TensorDataset(*points(40).tensors, torch.arange(40))
generator = torch.Generator().manual_seed(5)
ORDER
used = []
for x, y, index in run.batches(data, 4, epochs=3, order=order):
    used += index.tolist()
"""
    + TRAIN
    + """print("used", *used, flush=True)
"""
)
ORDERS = {
    "by the epoch": (
        "def order(epoch):\n"
        "    return torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()"
    ),
    "by the global generator": "def order(epoch):\n    return torch.randperm(40).tolist()",
    "by a generator": (
        "def order(epoch):\n    return torch.randperm(40, generator=generator).tolist()"
    ),
    "by the model": """def order(epoch):
    with torch.no_grad():
        return (model(data.tensors[0]) - data.tensors[1]).square()[:, 0].argsort().tolist()""",
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_a_function_gives_goes_on(name, tmp_path):
    outcome = killed_once(tmp_path, ORDERED.replace("ORDER", ORDERS[name]), die=18)
    assert (
        outcome.killed.code == -signal.SIGKILL and outcome.whole.code == outcome.resumed.code == 0
    ), outcome.resumed.text
    whole, rest = said(outcome.whole.text, "used"), said(outcome.resumed.text, "used")
    assert len(set(whole[:40])) == len(set(whole[40:80])) == 40 and rest == whole[60:]
    assert outcome.is_equal, outcome.rows


def test_an_order_that_cannot_be_found_again_is_refused_at_the_start(tmp_path):
    source = ORDERED.replace(
        "ORDER", "def order(epoch):\n    return sorted(range(40), key=lambda _: os.urandom(4))"
    )
    lived = live(tmp_path, source, "refused")
    assert lived.code == 78 and "order= gives two orders for epoch 0" in lived.text, lived.text
    assert not list((tmp_path / "refused" / "attempts").glob("*")), "no start was spent"


def test_ranks_whose_samplers_disagree_are_told_and_dealt_the_order_of_the_first(tmp_path):
    source = program(OWN.replace("manual_seed(5)", "manual_seed(5 + run.rank)")).replace(
        "DataLoader(data, 4,", "DataLoader(data, 2,"
    )
    outcome = killed_once(tmp_path, source, die=18, ranks=2)
    assert outcome.whole.code == outcome.resumed.code == 0, outcome.resumed.text
    assert (
        "the ranks' samplers give unlike orders: that of rank 0 is dealt out" in outcome.whole.text
    )
    used = [said(text, "used") for text in outcome.whole.texts]
    for epoch in range(3):
        assert (
            len({*used[0][20 * epoch : 20 * epoch + 20], *used[1][20 * epoch : 20 * epoch + 20]})
            == 40
        ), "each sample once"
    assert [said(text, "used") for text in outcome.resumed.texts] == [of[30:] for of in used]
    assert outcome.is_equal, outcome.rows


PARTS = BEGIN + """
data = points(48)
mine = torch.utils.data.Subset(data, PART)
if EVALUATES:
    for (x, y), more in run.batches(data, 4, epochs=2, beside={"more": data}):
        run.evaluate(mine, lambda batch: {"val_loss": batch[0].sum()})
for (x, y), more in run.batches(mine, 4, epochs=2, beside={"more": BESIDE}):
    pass
"""  # fmt: skip


@pytest.mark.parametrize(
    ("part", "beside", "found"),
    [
        ("range(run.rank, 48, 2)", "data", "the dataset: found 24 samples (%) on rank 0, 24"),
        ("range(8 + 8 * run.rank)", "data", "the dataset: found 8 samples (%) on rank 0, 16"),
        ("range(48)", "mine if run.rank else data", None),
        ("range(48)", "points(24 + run.rank)", "beside['more']: found 24 samples (%) on rank 0, 2"),
    ],
)
def test_ranks_that_are_given_unlike_data_are_refused_before_training(
    part, beside, found, tmp_path
):
    source = PARTS.replace("PART", part).replace("BESIDE", beside).replace("EVALUATES", "False")
    lived = live(tmp_path, source, "run", ranks=2)
    if found is None:
        assert lived.codes == [0, 0], lived.texts
        return
    assert lived.codes == [78, 78], lived.texts
    assert re.search(re.escape(found).replace("%", ".+"), lived.text), lived.text
    assert "Give every rank the whole dataset" in lived.text


def test_ranks_that_evaluate_unlike_data_are_refused(tmp_path):
    source = PARTS.replace("PART", "range(8 + run.rank)").replace("EVALUATES", "True")
    lived = live(tmp_path, source.replace("BESIDE", "data"), "run", ranks=2)
    assert lived.codes == [78, 78], lived.texts
    assert "found: 8, 9 samples, by rank" in lived.text


GROWS = (
    BEGIN
    + """
class Grows(Dataset):
    def __init__(self):
        self.samples = list(zip(*points(40).tensors))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return *self.samples[index], index


data = Grows()
used = []
for x, y, index in run.batches(data, 4, epochs=3):
    if run.step == 4 and GROWN:
        data.samples += data.samples[:8]
    used += index.tolist()
"""
    + TRAIN
    + """print("used", *used, flush=True)
"""
)


def test_a_dataset_that_grows_meanwhile_is_told_of_once_and_dealt_out_as_it_was(tmp_path):
    grown, steady = (
        live(tmp_path, GROWS.replace("GROWN", grows), name)
        for name, grows in (("grown", "True"), ("steady", "False"))
    )
    assert grown.code == steady.code == 0, grown.text
    assert grown.text.count("the dataset has 48 samples now, and 40 before") == 1
    assert (
        said(grown.text, "used") == said(steady.text, "used") and "samples now" not in steady.text
    )


def test_a_dataset_that_has_grown_at_a_restart_is_refused_with_both_sizes(tmp_path):
    """Or taken, if that is said; a plain loop would have gone on with either."""
    longer = GROWS.replace("run.step == 4 and GROWN", "False").replace("init()", "init(**more)")
    source = longer.replace("points(40)", "points(int(os.environ.get('COUNT', 40)))")
    source = f"more = dict(accept=['data']) if os.environ.get('ACCEPT') else {{}}\n{source}"
    assert live(tmp_path, source, "run", env={"DIE": "8"}).code == -9
    refused = live(tmp_path, source, "run", env={"COUNT": "48"})
    assert refused.code == 78 and "size: found 48, expected 40" in refused.text, refused.text
    accepted = live(tmp_path, source, "run", env={"COUNT": "48", "ACCEPT": "yes"})
    assert accepted.code == 0 and "finished" in accepted.text, accepted.text
