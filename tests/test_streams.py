"""Streams, and second sources in one loop: exact after a kill, or refused before training, or said."""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import pytest
import torch
from programs import killed_once, live
from test_library import newest

from harness.data import proof
from harness.data.order import Position
from harness.data.stream import StreamSource
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.ranks import World

STREAM = """
class Stream(IterableDataset):
    '''Numbers through a shuffle buffer, which its state forgets unless it is KEPT.'''
    def __init__(self, size=96, buffer=8, kept=False):
        self.size, self.buffer, self.kept = size, buffer, kept
        self.at, self.held = 0, []
    def __iter__(self):
        while self.at < self.size or self.held:
            while self.at < self.size and len(self.held) < self.buffer:
                self.held.append(self.at)
                self.at += 1
            number = self.held.pop(int(torch.randint(len(self.held), ())))
            yield torch.full((8,), number / self.size), torch.ones(1)
        self.at = 0
    def state_dict(self):
        return {"at": self.at} | ({"held": list(self.held)} if self.kept else {})
    def load_state_dict(self, state):
        self.at, self.held = state["at"], list(state.get("held", []))
"""
LOOP = """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(DATA, 8, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    die(run)
"""


def test_a_stream_whose_state_loses_its_shuffle_buffer_is_refused_before_training(tmp_path):
    lived = live(tmp_path, STREAM + LOOP.replace("DATA", "Stream()"), "whole")
    assert lived.code == 78
    assert "Stream would not go on exactly: its state_dict does not bring back" in lived.text
    assert "check_stream=False" in lived.text and "attempt" not in lived.text


def test_one_whose_state_keeps_it_is_exact_and_trains_as_if_it_had_not_been_tried(tmp_path):
    source = STREAM + LOOP.replace("DATA", "Stream(kept=True)")
    outcome = killed_once(tmp_path, source)
    assert "goes on from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert "warning" not in outcome.whole.text
    live(tmp_path, source.replace("epochs=2", "epochs=2, check_stream=False"), "unchecked")
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "unchecked"))) == []
    assert newest(tmp_path / "whole")["format_version"] == 1
