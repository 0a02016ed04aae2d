import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hpc_resume.checkpoint import objects
from hpc_resume.checkpoint.leaves import flatten
from hpc_resume.checkpoint.names import escape
from hpc_resume.errors import StateError
from tests.checkpoint.fakes import playing


def test_tensors_are_taken_out_under_their_paths():
    a, b = torch.ones(2), torch.zeros(())
    tree, leaves = flatten("k", {"x": [a, {"y": b}], 3: (np.arange(2),), "plain": 1})
    assert tree == {
        "$dict": [
            ["x", [{"$tensor": "k/x/0"}, {"$tensors": ["k/x/1", ["y"]]}]],
            [3, {"$tuple": [{"$ndarray": "k/3/0"}]}],
            ["plain", 1],
        ]
    }
    assert leaves["k/x/0"] is a
    assert leaves["k/x/1/y"] is b
    assert leaves["k/3/0"].tolist() == [0, 1]


def test_a_tensor_that_stands_twice_is_stored_once():
    weight = torch.ones(3, 2)
    tree, leaves = flatten(
        "k", {"a": weight, "b": weight.detach(), "c": weight.T, "d": weight[:2], "e": weight.clone()}
    )
    assert tree == {"$tensors": ["k", ["a", ["b", "k/a"], "c", "d", "e"]]}
    assert set(leaves) == {"k/a", "k/c", "k/d", "k/e"}
    names = {"k/a": "k/a", "k/b": "k/a", "k/c": "k/c", "k/d": "k/d", "k/e": "k/e"}
    assert list(objects.tensor_names(tree).items()) == list(names.items())
    tree, _ = flatten("k", {"a": weight, "b": weight.detach(), "number": 1})
    assert tree == {"a": {"$tensor": "k/a"}, "b": {"$same": ["k/b", "k/a"]}, "number": 1}


def test_three_that_are_at_one_place_and_two_of_them_one():
    weight = torch.ones(3, 2)
    tree, leaves = flatten("k", {"a": weight[:1], "b": weight, "c": weight.detach(), "d": weight[:1]})
    assert tree == {"$tensors": ["k", ["a", "b", ["c", "k/b"], ["d", "k/a"]]]}
    assert set(leaves) == {"k/a", "k/b"}


def test_a_conjugate_is_not_one_with_what_it_is_the_conjugate_of():
    x = torch.randn(3, dtype=torch.complex64)
    _, leaves = flatten("k", {"x": x, "conjugate": x.conj(), "same": x})
    assert set(leaves) == {"k/x", "k/conjugate"}


def test_dicts_of_tensors_keep_their_odd_keys():
    state = {"": torch.ones(1), ".": torch.zeros(1), "a/b%": torch.ones(2)}
    tree, leaves = flatten("k", state)
    assert tree == {"$tensors": ["k", ["", ".", "a/b%"]]}
    assert set(leaves) == {"k/%", "k/%2E", "k/a%2Fb%25"}
    decoded = objects.decode(objects.parse(objects.dump(tree)), lambda _tag, name: leaves[name])
    assert list(decoded) == list(state)
    assert all(decoded[key] is state[key] for key in state)


def test_tensors_without_elements_are_not_taken_for_one():
    _, leaves = flatten("k", {"a": torch.empty(0, 3), "b": torch.empty(0, 3)})
    assert set(leaves) == {"k/a", "k/b"}


@pytest.mark.parametrize("rows", [8, 2, 1])
def test_all_ranks_find_the_same_tied_tensors(rows):
    # With fewer rows than ranks, some hold nothing of them; they must come to the same names all the same.
    found = set()
    for rank in range(4):
        with playing(rank, 4):
            net = torch.nn.Sequential(*(torch.nn.Linear(3, rows, bias=False) for _ in range(3)))
            net[1].weight = net[0].weight
            fully_shard(net, mesh=init_device_mesh("cpu", (4,)))
            tree, leaves = flatten("net", net.state_dict())
            found.add((str(tree), tuple(leaves)))
    assert len(found) == 1
    assert found.pop()[1] == ("net/0.weight", "net/2.weight")


@pytest.mark.parametrize(
    ("component", "escaped"), [("a/b", "a%2Fb"), ("100%", "100%25"), (".", "%2E"), ("", "%"), ("a.b", "a.b")]
)
def test_components_become_names_of_links(component, escaped):
    assert escape(component) == escaped


def test_names_that_clash_are_refused():
    with pytest.raises(StateError, match="k/1: two entries of the state have this name"):
        flatten("k", {1: torch.ones(1), "1": torch.ones(1)})


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2, dtype=torch.complex32), "tensors of type torch.complex32"),
        (np.ones(2, ">f4"), "an array of type '>f4'.*astype"),
        (np.ones(2, np.longdouble), "an array of type '<f16'.*astype"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "type numpy.ma.*MaskedArray can't be stored"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused_by_their_path(tensor, why):
    with pytest.raises(StateError, match=f"k(/x|\\['x'\\]).*{why}"):
        flatten("k", {"x": tensor})


class Wrapped(torch.Tensor):
    """Holds its values elsewhere, as quantized and otherwise special tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_tensors_that_hold_others_are_refused():
    with pytest.raises(StateError, match="k/x: a tensor of type Wrapped can't be stored"):
        flatten("k", {"x": Wrapped(torch.ones(2))})


def test_subclasses_without_a_behaviour_of_their_own_are_tensors():
    class Named(torch.Tensor):
        pass

    _, leaves = flatten("k", {"x": torch.ones(2).as_subclass(Named), "y": torch.nn.Buffer(torch.ones(3))})
    assert set(leaves) == {"k/x", "k/y"}
