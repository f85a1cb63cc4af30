"""A run directory is durable whoever has created its folders."""

from __future__ import annotations

from simulated_disk import Disk, SimulatedPath, System
from simulated_lives import Machine, simulated
from simulator import Process, Simulator

from harness.checkpoint import format as fmt
from harness.store import LocalStore


def begun(simulator: Simulator, disk: Disk, calls: int | None) -> None:
    """Prepare a run directory, in a process that is killed in the call of this number."""
    process = Process(simulator, f"until call {calls}", Machine(disk))
    process.due = {calls: process.kill} if calls else {}

    def prepare() -> None:
        store = LocalStore("/sim/run")
        store.root = SimulatedPath("/sim/run")
        store.prepare(fmt.FOLDERS)
        if not calls:
            store.write("checkpoints/a", b"kept", 1)

    task = simulator.spawn(process, "", prepare)
    simulator.wait(lambda: task.is_over)


def test_a_save_survives_a_power_loss_in_a_folder_that_a_killed_process_has_created():
    simulator, left = Simulator(0), list[dict[str, bytes]]()

    def all_kills() -> None:
        for calls in range(1, 30):
            disk = Disk(0)
            begun(simulator, disk, calls)
            begun(simulator, disk, None)
            left.append(disk.files("/sim/run", durable=True))

    with simulated(simulator, System(simulator)):
        simulator.run(Process(simulator, "test", None), all_kills)
    assert left == [{"checkpoints/a": b"kept"}] * len(left)
