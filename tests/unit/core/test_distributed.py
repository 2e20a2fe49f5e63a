import pickle
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from triptych.core import distributed
from triptych.core.errors import CheckpointError

WORLD = 2


def test_one_process_needs_no_initialisation():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main() and not distributed.is_distributed()
    distributed.barrier()
    for result in (
        distributed.all_reduce_sum(tensor),
        distributed.all_reduce_max(tensor),
        distributed.all_gather_rows(tensor)[0],
    ):
        assert result.tolist() == [1.0, 2.0]
        assert not result.requires_grad and result.data_ptr() != tensor.data_ptr()
    assert distributed.all_gather_rows(tensor)[1] == 0
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.call_on_main(lambda: "x") == "x"


def _collect(rank: int) -> dict[str, object]:
    local = torch.full((rank + 1,), float(rank + 1))
    results: dict[str, object] = {
        "place": (distributed.rank(), distributed.world_size(), distributed.is_main(), distributed.is_distributed()),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, rank])).tolist(),
        "max": distributed.all_reduce_max(torch.tensor([rank, -rank])).tolist(),
        "objects": distributed.all_gather_objects({"rank": rank}),
    }
    results["on_main"] = distributed.call_on_main(lambda: ("done by", distributed.rank()))
    new_group, results["groups"] = dist.new_group, []

    def recorded(**options: object) -> object:
        results["groups"].append(options)  # type: ignore[attr-defined]
        return new_group(**options)

    dist.new_group = recorded  # this process is the test's own
    results["long"] = distributed.call_on_main(lambda: f"patiently by {rank}", is_long=True)
    distributed.call_on_main(lambda: "at once")
    dist.new_group = new_group
    try:
        distributed.call_on_main(_fail)
    except CheckpointError as error:
        results["failure"] = str(error)
    uneven, start = distributed.all_gather_rows(local[:, None].expand(-1, 2).requires_grad_())
    results["uneven"] = (uneven.tolist(), start, uneven.requires_grad)
    one_empty, start = distributed.all_gather_rows(torch.arange(3 * rank).reshape(-1, 1))
    results["one_empty"] = (one_empty.tolist(), start, str(one_empty.dtype))
    all_empty, start = distributed.all_gather_rows(torch.zeros(0, 4))
    results["all_empty"] = (tuple(all_empty.shape), start)
    untouched = torch.tensor([1.0])
    distributed.all_reduce_sum(untouched)
    results["untouched"] = untouched.tolist()
    distributed.barrier()
    return results


def _fail() -> None:
    raise CheckpointError(f"the disk of rank {distributed.rank()} is full", file="step-1")


def _worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        outcome: object = _collect(rank)
    except Exception:
        outcome = traceback.format_exc()
    Path(folder, str(rank)).write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_worker, args=(port, str(folder)), nprocs=WORLD)
    outcomes = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(WORLD)]
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    return outcomes


def test_places(ranks):
    assert [outcome["place"] for outcome in ranks] == [(0, 2, True, True), (1, 2, False, True)]


def test_reductions_give_new_tensors(ranks):
    assert [outcome["sum"] for outcome in ranks] == [[2.0, 1.0]] * 2
    assert [outcome["max"] for outcome in ranks] == [[1, 0]] * 2
    assert [outcome["untouched"] for outcome in ranks] == [[1.0]] * 2


def test_objects(ranks):
    assert [outcome["objects"] for outcome in ranks] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_what_the_main_rank_does_alone_ends_alike_on_all(ranks):
    assert [outcome["on_main"] for outcome in ranks] == [("done by", 0)] * 2
    assert [outcome["long"] for outcome in ranks] == ["patiently by 0"] * 2
    for outcome in ranks:
        (options,) = outcome["groups"]
        assert options["backend"] == "gloo" and options["timeout"].days >= 1
    first, second = (outcome["failure"] for outcome in ranks)
    assert first == second and "the disk of rank 0 is full" in first


@pytest.mark.requirement("B-5")
def test_rows_of_unlike_number_are_joined_in_rank_order(ranks):
    rows = [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert [outcome["uneven"] for outcome in ranks] == [(rows, 0, False), (rows, 1, False)]


def test_ranks_without_rows_take_part(ranks):
    rows = [[0], [1], [2]]
    assert [outcome["one_empty"] for outcome in ranks] == [(rows, 0, "torch.int64"), (rows, 0, "torch.int64")]
    assert [outcome["all_empty"] for outcome in ranks] == [((0, 4), 0)] * 2
