"""Which kernels are tried, in which order, and what becomes of products for which none is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rocm.errors import UsageError
from megatron_rocm.tune.choose import choose
from megatron_rocm.tune.shapes import Gemm
from megatron_rocm.tune.trial import Answer, Ruling
from megatron_rocm.tune.tuned import By, Candidate, Product


def gemm(name: str, m: int = 64, by: str = "torch") -> Gemm:
    return Gemm(name, "forward", m, 64, 64, "TN", "bf16", "bf16", accumulates=False, count=2, by=by)  # type: ignore[arg-type]


@dataclass
class World:
    """Kernels with their times, which of them are right, and what is asked of it."""

    times: Mapping[str, float]
    right: frozenset[str]
    default: str = "own"
    dies: frozenset[str] = frozenset()  # kernels whose process ends with them
    fails: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    by: By = "hipblaslt"

    def run(self, most: int, *gemms: Gemm) -> dict[str, Product]:
        decided, _ = choose(_Tuner(self), gemms, self.judge, most, self.said.append)
        return {name.split()[0]: product for product in decided for name in product.names}

    def judge(self, gemms: Sequence[Gemm], chosen: Mapping[str, Candidate]) -> Answer:
        self.asked.append({gemm.name: chosen[gemm.key].kernel if chosen else self.default for gemm in gemms})
        rulings = {}
        for one in gemms:
            kernel = chosen[one.key].kernel if chosen else self.default
            rulings[one.key] = Ruling(kernel in self.right, "" if kernel in self.right else f"{kernel} is wrong")
            if kernel in self.dies:
                break
        return Answer(rulings)


class _Tuner:
    by: By = "hipblaslt"

    def __init__(self, world: World) -> None:
        self.world = world

    def reaches(self, gemm: Gemm) -> str:
        return "out of reach" if gemm.by == "apex" else ""

    def candidates(self, gemm: Gemm) -> list[Candidate]:
        if gemm.name == self.world.fails:
            raise UsageError("the benchmark failed")
        return [Candidate(kernel, us) for kernel, us in self.world.times.items()]

    def default(self, gemm: Gemm, candidates: Sequence[Candidate], answer: Answer) -> Candidate | None:
        return next((one for one in candidates if one.kernel == self.world.default), None)

    def applied(self, gemm: Gemm, candidate: Candidate, answer: Answer) -> str:
        return ""

    def write(self, folder: Path, chosen: Mapping[str, Candidate], gpus: int) -> list[str]:
        return []


TIMES = {"own": 100.0, "c": 97.0, "b": 60.0, "a": 50.0, "near": 98.5, "slow": 300.0}


def test_the_fastest_right_one_wins() -> None:
    world = World(TIMES, frozenset({"own", "b", "c", "near", "slow"}))
    product = world.run(8, gemm("fc1"))["fc1"]
    assert product.kernel == Candidate("b", 60.0) and product.default_us == 100.0 and product.count == 2
    assert [(one.kernel, one.why) for one in product.refused] == [("a", "a is wrong")]
    assert world.asked == [{"fc1": "own"}, {"fc1": "a"}, {"fc1": "b"}]


def test_what_is_within_the_noise_is_not_tried() -> None:
    world = World(TIMES, frozenset({"own", "near", "slow"}))
    product = world.run(8, gemm("fc1"))["fc1"]
    assert product.kernel is None and product.why == "no faster kernel is right"
    assert [one.kernel for one in product.refused] == ["a", "b", "c"]
    world = World({"own": 100.0, "near": 98.5, "slow": 300.0}, frozenset(TIMES))
    assert world.run(8, gemm("fc1"))["fc1"].why == "the library's own choice is the fastest"
    assert len(world.asked) == 1


def test_only_so_many_are_tried() -> None:
    world = World(TIMES, frozenset({"own", "c"}))
    assert world.run(2, gemm("fc1"))["fc1"].kernel is None
    assert len(world.asked) == 3


def test_where_the_librarys_own_is_wrong_any_right_one_is_better() -> None:
    world = World({"own": 100.0, "slow": 300.0, "near": 98.5}, frozenset({"slow"}))
    assert world.run(8, gemm("fc1"))["fc1"].kernel == Candidate("slow", 300.0)
    assert any("own kernel for fc1 forward is wrong: own is wrong" in line for line in world.said)


def test_a_kernel_that_takes_the_process_along_spoils_no_other_product() -> None:
    world = World(TIMES, frozenset({"own", "b"}), dies=frozenset({"a"}))
    found = world.run(8, gemm("fc1"), gemm("fc2", 128), gemm("qkv", 256))
    assert {name: product.kernel and product.kernel.kernel for name, product in found.items()} == {
        "fc1": "b", "fc2": "b", "qkv": "b",
    }  # fmt: skip
    rounds = [{"fc1": "a", "fc2": "a", "qkv": "a"}, {"fc1": "b", "fc2": "a", "qkv": "a"}, {"fc2": "b", "qkv": "a"}]
    assert world.asked[1:] == [*rounds, {"qkv": "b"}]


def test_a_default_that_takes_the_process_along_is_followed_by_the_others() -> None:
    world = World(TIMES, frozenset({"b"}), dies=frozenset({"own"}))
    found = world.run(8, gemm("fc1"), gemm("fc2", 128))
    assert {product.kernel and product.kernel.kernel for product in found.values()} == {"b"}
    assert world.asked[:2] == [{"fc1": "own", "fc2": "own"}, {"fc2": "own"}]


def test_alike_products_are_tuned_once_and_others_not_at_all() -> None:
    world = World(TIMES, frozenset(TIMES), fails="qkv")
    found = world.run(8, gemm("fc1"), gemm("fc2"), gemm("head", 128, by="apex"), gemm("qkv", 256))
    assert (
        found["fc1"] is found["fc2"]
        and found["fc1"].names == ("fc1 forward", "fc2 forward")
        and found["fc1"].count == 4
    )
    assert found["head"].why == "out of reach" and found["qkv"].why == "not tuned: the benchmark failed"
    assert list(found) == ["fc1", "fc2", "head", "qkv"]


def test_nothing_is_judged_where_nothing_can_be_chosen() -> None:
    world = World(TIMES, frozenset(TIMES))
    assert world.run(8, gemm("head", by="apex"))["head"].why == "out of reach" and not world.asked
