from distributed_lm.data.ledger import advance, genesis


def test_head_depends_on_corpus_blocks_and_their_order():
    head = advance(genesis("a"), [(0, 0, 1), (0, 0, 2)])
    assert advance(genesis("a"), [(0, 0, 1), (0, 0, 2)]) == head
    assert advance(genesis("b"), [(0, 0, 1), (0, 0, 2)]) != head
    assert advance(genesis("a"), [(0, 0, 2), (0, 0, 1)]) != head
    assert advance(genesis("a"), [(0, 1, 1), (0, 0, 2)]) != head
    assert advance(head, []) != head
    assert len(head) == 64


def test_steps_are_kept_apart():
    together = advance(genesis("a"), [(0, 0, 1), (0, 0, 2)])
    apart = advance(advance(genesis("a"), [(0, 0, 1)]), [(0, 0, 2)])
    assert together != apart
