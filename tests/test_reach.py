"""A storage that is another one on a node, or none, is found before the first trial."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tune.preflight.reach import Proof, check_place, check_reach, on_every_node, prove
from tune.preflight.room import PreflightError

Ask = Callable[[Proof], dict[str, tuple[str, list[str]]]]


def nodes(*views: Callable[[Proof], Proof]) -> Ask:
    """A cluster whose nodes see the paths of a proof each in their own way."""

    def ask(proof: Proof) -> dict[str, tuple[str, list[str]]]:
        return {f"n{index}": (f"10.0.0.{index}", prove(view(proof), f"n{index}")) for index, view in enumerate(views)}

    return ask


def same(proof: Proof) -> Proof:
    return proof


def test_one_folder_on_all_nodes_is_fine_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    inputs = {"--data": str(tmp_path / "data"), "--textures": "", "--teacher-weights": "s3://b/none.pth"}
    check_reach(str(tmp_path / "home"), inputs, nodes(same, same))
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_the_same_path_on_another_machine_is_found(exists: bool, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other machine" / "home"
    if exists:
        elsewhere.mkdir(parents=True)
    with pytest.raises(PreflightError) as found:
        check_reach(str(tmp_path / "home"), {}, nodes(same, lambda proof: proof._replace(home=str(elsewhere))))
    (line,) = str(found.value).splitlines()
    assert line.startswith("node 10.0.0.1: --storage ") and "is not the folder that the driver writes to" in line
    assert "give folders that all nodes share, or s3://" in line
    assert elsewhere.exists() == exists and list((tmp_path / "home").iterdir()) == [], "nothing is made by looking"


def test_what_a_node_writes_must_arrive(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"node 10.0.0.7: what it writes to .*home does not arrive"):
        check_reach(str(tmp_path / "home"), {}, lambda proof: {"n7": ("10.0.0.7", [])})


def test_inputs_must_be_on_every_node_and_all_that_lacks_is_said(tmp_path: Path) -> None:
    inputs = {"--data": str(tmp_path / "none"), "--textures": str(tmp_path / "dtd")}
    with pytest.raises(PreflightError) as found:
        check_reach(str(tmp_path / "home"), inputs, nodes(same, same))
    lines = str(found.value).splitlines()
    assert len(lines) == 4 and all("does not exist" in line for line in lines)


def test_a_storage_without_a_right_to_write_is_said_in_a_line(tmp_path: Path) -> None:
    blocked = tmp_path / "home"

    def ask(proof: Proof) -> dict[str, tuple[str, list[str]]]:
        (blocked / proof.token / "n0.json.partial").mkdir()  # what a node is going to write
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tune.storage.files.RETRY_ATTEMPTS", 1)
            return {"n0": ("10.0.0.1", prove(proof, "n0"))}

    with pytest.raises(PreflightError, match=r"node 10.0.0.1: --storage .* cannot be used: writing") as found:
        check_reach(str(blocked), {}, ask)
    assert "\n" not in str(found.value)


def test_a_folder_in_the_code_of_a_job_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temporary folder, which goes with the job; give .* or s3://"):
        check_place("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/dskd-results")
    check_place("/srv/results")
    check_place("s3://bucket/working_dir_files/x")


def test_a_node_that_does_not_answer_is_told_and_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    def ask(proof: Proof) -> dict[str, tuple[str, list[str] | str]]:
        return {"n1": ("10.0.0.1", "no answer within 60 s"), "n2": ("10.0.0.2", prove(proof, "n2"))}

    check_reach(str(tmp_path / "home"), {}, ask, said.append)
    assert said == ["node 10.0.0.1 could not be checked: no answer within 60 s"]


@pytest.mark.cluster
def test_real_nodes_prove_it(local_ray: None, tmp_path: Path) -> None:
    check_reach(str(tmp_path / "home"), {"--data": str(tmp_path)}, on_every_node)
    with pytest.raises(PreflightError, match=r"node .*: --data .*/none does not exist"):
        check_reach(str(tmp_path / "home"), {"--data": str(tmp_path / "none")})
