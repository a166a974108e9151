"""What each slot is set to: the book alone, against a history that is written down plainly."""

from __future__ import annotations

import pytest
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from keisei.exceptions import SerializationError
from keisei.training.parallel.settings import SettingsBook, packed, unpacked

NAMES = st.sampled_from(["a", "b", "c"])
CHANGES = st.dictionaries(NAMES, st.integers(0, 9), max_size=3)
SLOTS = range(5)


class Process:
    """A slot's process: what it was begun with, and the changes that it was told, in order."""

    def __init__(self, version, values):
        self.version, self.values = version, values
        self.told = []


class Books(RuleBasedStateMachine):
    """Any order of changes, answers, deaths, starts and new slots."""

    @initialize(number=st.integers(1, 3), by_id=st.booleans())
    def begin(self, number, by_id):
        self.initial = (lambda worker_id: {"id": worker_id}) if by_id else {"a": -1}
        self.book = SettingsBook(self.initial, number)
        self.slots = set(range(number))
        self.processes = {}
        self.changes = []  # (version, slots or None, change)
        self.refusals = set()  # (slot, version)

    def history(self, worker_id, version):
        """Return what a slot is set to at a version, by all that was said and refused."""
        values = {"id": worker_id} if callable(self.initial) else dict(self.initial)
        for number, slots, change in self.changes:
            is_for_it = slots is None or worker_id in slots
            if number <= version and is_for_it and (worker_id, number) not in self.refusals:
                values |= change
        return values

    @rule(change=CHANGES, chosen=st.none() | st.sets(st.sampled_from(SLOTS)))
    def change(self, change, chosen):
        ids = None if chosen is None else chosen & self.slots
        whom = self.slots if ids is None else ids
        told = {worker_id for worker_id in whom if worker_id in self.processes}
        version = self.book.change(packed(change), ids, told)
        assert version == len(self.changes) + 1
        self.changes.append((version, ids, change))
        for worker_id in told:
            self.processes[worker_id].told.append((version, change))

    @rule(worker_id=st.sampled_from(SLOTS), refuses=st.booleans())
    def answer(self, worker_id, refuses):
        process = self.processes.get(worker_id)
        if process is None or not process.told:
            return
        version, change = process.told.pop(0)
        if refuses:
            self.book.refused(worker_id, version)
            self.refusals.add((worker_id, version))
            if any(number == version and slots is None for number, slots, _ in self.changes):
                # Slots to come forget it too.
                self.refusals |= {(one, version) for one in SLOTS if one not in self.slots}
        else:
            process.version, process.values = version, process.values | change
            self.book.confirmed(worker_id, version)

    @rule(worker_id=st.sampled_from(SLOTS))
    def die(self, worker_id):
        process = self.processes.pop(worker_id, None)
        for version, _ in process.told if process is not None else ():
            self.book.lost(worker_id, version)

    @rule(worker_id=st.sampled_from(SLOTS))
    def start(self, worker_id):
        if worker_id in self.slots and worker_id not in self.processes:
            version, values = self.book.greet(worker_id)
            self.processes[worker_id] = Process(version, unpacked(values))

    @rule(number=st.integers(1, len(SLOTS)))
    def add(self, number):
        self.book.add(range(number))
        self.slots |= set(range(number))

    @invariant()
    def whatever_a_process_has_is_what_its_version_names(self):
        for worker_id, process in getattr(self, "processes", {}).items():
            assert process.values == self.history(worker_id, process.version)

    @invariant()
    def a_slot_is_set_to_all_that_was_said(self):
        for worker_id in getattr(self, "slots", ()):
            expected = self.history(worker_id, len(self.changes))
            assert unpacked(self.book.packed_of(worker_id)) == expected

    @invariant()
    def nothing_piles_up(self):
        if hasattr(self, "book") and not any(one.told for one in self.processes.values()):
            assert len(self.book._for_all) <= 1
            assert all(not slot.pending for slot in self.book._slots.values())


def test_any_history_of_settings():
    """Whatever a process or a slot has is what was said to it and not refused, in order."""
    profile_ = profile(max_examples=40, stateful_step_count=30)
    run_state_machine_as_test(Books, settings=profile_)


def test_values_are_copies():
    """What is changed after it was given changes no slot; nor does what was asked for."""
    level = {"maps": ["a"]}
    book = SettingsBook({"level": level}, 1)
    level["maps"].append("b")
    given = unpacked(book.packed_of(0))
    assert given == {"level": {"maps": ["a"]}}
    given["level"]["maps"].clear()
    assert unpacked(book.packed_of(0)) == {"level": {"maps": ["a"]}}


def test_what_is_no_setting_is_refused_with_its_name():
    """Before anything is changed, also for a slot that is added later."""
    with pytest.raises(SerializationError, match=r"^setting 'f' cannot be pickled"):
        SettingsBook({"f": lambda: None}, 1)
    with pytest.raises(TypeError, match="settings are a list; give a mapping"):
        SettingsBook([1], 1)
    with pytest.raises(TypeError, match="names that are text; 3 is none"):
        packed({3: 1})
    book = SettingsBook(lambda worker_id: {"x": 1} if worker_id < 2 else None, 2)
    with pytest.raises(TypeError, match="settings are a NoneType"):
        book.add(range(4))
    assert sorted(book._slots) == [0, 1]
