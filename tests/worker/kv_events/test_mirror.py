"""The mirror of an engine's blocks: chains, copies, mediums and losses; and the order of the engine's batches."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.prefix.block_keys import prompt_keys, unpack
from kv_transfer.prefix.events import GONE, BlockDelta, BlocksCleared, BlocksFound, BlocksRemoved, BlocksStored, Medium
from worker.kv_events.event_order import EventOrder
from worker.kv_events.mirror import BlockMirror

SIZE = 4
TOKENS = list(range(100, 140))
KEYS = unpack(prompt_keys(TOKENS, SIZE))
NAMES = [f"hash {block}".encode() for block in range(len(KEYS))]


def mirror(blocks_max: int = 100) -> BlockMirror:
    made = BlockMirror(epoch=1, block_size_tokens=SIZE, blocks_max=blocks_max)
    made.take(10)
    return made


def stored(first: int, last: int, medium: Medium = Medium.HBM) -> BlocksStored:
    return BlocksStored(
        hashes=NAMES[first:last],
        parent=NAMES[first - 1] if first else None,
        token_ids=TOKENS[first * SIZE : last * SIZE],
        block_size_tokens=SIZE,
        medium=medium,
    )


def removed(*blocks: int, medium: Medium = Medium.HBM) -> BlocksRemoved:
    return BlocksRemoved(hashes=[NAMES[block] for block in blocks], medium=medium)


def told(delta: BlockDelta) -> dict[int, int]:
    """Level by number of the block."""
    return {KEYS.index(key): level for level, packed in delta.levels.items() for key in unpack(packed)}


def test_stored_blocks_are_told_once_under_batons_keys() -> None:
    made = mirror()
    made.apply([stored(0, 2), stored(2, 3)])
    assert told(made.take(10)) == {0: 0, 1: 0, 2: 0}
    empty = made.take(10)
    assert told(empty) == {} and not empty.reset and not empty.more


def test_a_block_behind_a_removed_one_is_hidden_until_that_one_is_back() -> None:
    made = mirror()
    made.apply([stored(0, 4)])
    made.take(10)
    made.apply([removed(1)])
    assert told(made.take(10)) == {1: GONE, 2: GONE, 3: GONE}
    made.apply([removed(3), stored(1, 2)])
    # What was told before is told again where it changed to and fro: harmless.
    assert told(made.take(10)) == {1: 0, 2: 0}
    made.apply([removed(0, 1, 2)])
    assert told(made.take(10)) == {0: GONE, 1: GONE, 2: GONE} and len(made) == 0


def test_a_copy_that_goes_leaves_the_other() -> None:
    made = mirror()
    made.apply([stored(0, 2), stored(0, 2), stored(0, 2), removed(1), removed(1)])
    assert told(made.take(10)) == {0: 0, 1: 0}
    made.apply([removed(1)])
    assert told(made.take(10)) == {1: GONE}
    made.apply([removed(0), removed(0), removed(0)])
    assert told(made.take(10)) == {0: GONE}


def test_the_slowest_medium_of_a_prefix_is_its_level() -> None:
    made = mirror()
    made.apply([stored(0, 4), stored(1, 3, Medium.HOST), removed(1)])
    assert told(made.take(10)) == {0: 0, 1: 1, 2: 1, 3: 1}
    made.apply([stored(1, 2)])
    assert told(made.take(10)) == {1: 0, 2: 0, 3: 0}
    made.apply([removed(1, medium=Medium.HOST), removed(1)])
    assert told(made.take(10)) == {1: GONE, 2: GONE, 3: GONE}


def test_what_cannot_be_named_is_ignored() -> None:
    made = mirror()
    made.apply([stored(1, 3), stored(0, 2, Medium.HOST), removed(5)])
    other_size = BlocksStored(hashes=NAMES[:1], parent=None, token_ids=TOKENS[:3], block_size_tokens=3)
    other_group = BlocksStored(hashes=NAMES[:1], parent=None, token_ids=TOKENS[:4], block_size_tokens=SIZE, group=1)
    made.apply([other_size, other_group])
    assert made.untold == 0 and len(made) == 0 and made.ignored == 5


def test_a_loss_empties_it_and_blocks_that_are_stored_anew_are_known_again() -> None:
    made = mirror()
    made.apply([stored(0, 4)])
    made.take(10)
    made.lose()
    made.apply([stored(4, 5), removed(3)])
    delta = made.take(10)
    assert delta.reset and told(delta) == {} and made.losses == 1
    made.apply([stored(0, 3), stored(3, 4)])
    assert told(made.take(10)) == dict.fromkeys(range(4), 0)


def test_a_cleared_engine_has_nothing() -> None:
    made = mirror()
    made.apply([stored(0, 4), BlocksCleared(), stored(0, 1)])
    delta = made.take(10)
    assert delta.reset and told(delta) == {0: 0}


def test_more_blocks_than_the_bound_empty_it() -> None:
    made = mirror(blocks_max=3)
    made.apply([stored(0, 3), stored(3, 5)])
    assert len(made) == 0 and made.losses == 1


def found(*blocks: int, medium: Medium = Medium.FILE) -> BlocksFound:
    return BlocksFound(
        hashes=[NAMES[block] for block in blocks],
        parents=[NAMES[block - 1] if block else None for block in blocks],
        digests=[KEYS[block].to_bytes(7, "little") for block in blocks],
        medium=medium,
    )


def test_blocks_in_a_store_are_known_by_the_names_that_come_with_them() -> None:
    made = BlockMirror(epoch=1, block_size_tokens=SIZE, blocks_max=100, store_blocks_max=4)
    order = EventOrder(made)
    order.told([found(0, 1, 2), found(8)])
    assert told(made.take(10)) == dict.fromkeys(range(3), Medium.FILE) and made.ignored == 1
    order.batch(0, [stored(0, 1)])
    order.told([removed(1, medium=Medium.FILE), found(1, medium=Medium.OBJECT)])
    assert told(made.take(10)) == {0: Medium.HBM, 1: Medium.OBJECT, 2: Medium.OBJECT}
    order.told([found(3), found(4)])
    assert told(made.take(10)) == {3: Medium.OBJECT} and made.ignored == 2


def test_a_loss_and_a_cleared_engine_leave_what_is_in_stores() -> None:
    for event in ("lose", "clear"):
        made = BlockMirror(epoch=1, block_size_tokens=SIZE, blocks_max=100, store_blocks_max=100)
        made.apply([stored(0, 4), found(0, 1)])
        made.take(10)
        if event == "lose":
            made.lose()
        else:
            made.apply([BlocksCleared()])
        delta = made.take(10)
        assert delta.reset and told(delta) == {0: Medium.FILE, 1: Medium.FILE}


def test_a_snapshot_comes_in_pieces() -> None:
    made = mirror()
    made.apply([stored(0, 5)])
    made.take(10)
    made.snapshot()
    pieces = [made.take(2) for _ in range(3)]
    assert [(piece.reset, piece.more, piece.seq) for piece in pieces] == [
        (True, True, 3),
        (False, True, 4),
        (False, False, 5),
    ]
    assert {block for piece in pieces for block in told(piece)} == set(range(5))


def ordered() -> tuple[BlockMirror, EventOrder]:
    made = mirror()
    return made, EventOrder(made, early_batches_max=3)


def batches() -> list[Sequence[BlocksStored]]:
    return [[stored(block, block + 1)] for block in range(len(NAMES))]


def test_batches_are_applied_in_turn_once() -> None:
    made, order = ordered()
    for seq in (0, 2, 2, 1, 0, 3):
        order.batch(seq, batches()[seq])
    assert order.replay_from is None
    assert told(made.take(10)) == dict.fromkeys(range(4), 0) and made.losses == 0


def test_a_gap_asks_for_a_replay_that_fills_it() -> None:
    made, order = ordered()
    for seq in (0, 3):
        order.batch(seq, batches()[seq])
    assert order.replay_from == 1
    for seq in (1, 2, 3):
        order.batch(seq, batches()[seq])
    order.replay_ended()
    assert told(made.take(10)) == dict.fromkeys(range(4), 0) and made.losses == 0


def test_a_gap_that_the_replay_does_not_fill_empties_the_mirror() -> None:
    made, order = ordered()
    for seq in (0, 3):
        order.batch(seq, batches()[seq])
    order.replay_ended()
    assert order.replay_from is None and made.losses == 1 and len(made) == 0
    order.batch(4, [stored(0, 1)])
    assert told(made.take(10)) == {0: 0}


def test_a_gap_is_given_up_when_too_much_waits_behind_it_and_an_unreadable_batch_is_one() -> None:
    made, order = ordered()
    for seq in (1, 2, 3, 4):
        order.batch(seq, batches()[seq])
    assert order.replay_from is None and made.losses == 1
    order.batch(5, None)
    assert made.losses == 2
