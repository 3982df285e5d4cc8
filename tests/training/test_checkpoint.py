"""Saving beside training, resuming on other meshes, and everything that can be wrong with a disk."""

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from kontext_train.errors import ConfigError, StorageError
from kontext_train.training.checkpoint import complete_checkpoints, find_resume, newest_whole
from kontext_train.training.checkpoint_files import damage, place
from kontext_train.training.checkpoint_saver import HostCopies, Saver, _prune, kept
from kontext_train.training.config import Best, CheckpointConfig
from tests.runs import in_processes
from tests.servers import BUCKET, s3_server
from tests.training.tiny_run import TinyRun, tiny_run


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for the event."""
    go, save = threading.Event(), dcp.save

    def waiting(*arguments: Any, **options: Any) -> Any:
        go.wait()
        return save(*arguments, **options)

    monkeypatch.setattr("kontext_train.training.checkpoint_saver.dcp.save", waiting)
    yield go
    go.set()


def trained_to(run: TinyRun, step: int) -> str:
    while run.step < step:
        run.advance()
    return run.digest()


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_disk(monkeypatch) as go, tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig())
        at_two = trained_to(run, 2)
        run.save(saver)
        at_four = trained_to(run, 4)
        assert complete_checkpoints(tmp_path) == [], "training went on while nothing was written"
        go.set()
        saver.finish()
        run.resume(tmp_path)
        assert (run.step, run.digest()) == (2, at_two)
        assert trained_to(run, 4) == at_four


def test_without_the_copy_it_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(HostCopies, "of", lambda self, state: state)
    with slow_disk(monkeypatch) as go, tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig())
        at_two = trained_to(run, 2)
        run.save(saver)
        trained_to(run, 4)
        go.set()
        saver.finish()
        run.resume(tmp_path)
        assert (run.step, run.digest() == at_two) == (2, False)


def test_host_memory_is_taken_once() -> None:
    with tiny_run() as run:
        copies = HostCopies()
        first = copies.of(run.state())["ema"]["layers.0.weight"].to_local()
        run.advance()
        second = copies.of(run.state())["ema"]["layers.0.weight"].to_local()
        assert first.data_ptr() == second.data_ptr()
        assert first.data_ptr() != run.ema.average["layers.0.weight"].to_local().data_ptr()


def test_a_save_waits_for_the_one_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with slow_disk(monkeypatch) as go, tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig())
        trained_to(run, 1)
        run.save(saver)
        threading.Timer(0.2, go.set).start()
        trained_to(run, 2)
        run.save(saver)
        assert complete_checkpoints(tmp_path)[0].name == "step_00000001", "the first is complete"
        assert "step 2 waits for the save of step 1: saves come faster" in capsys.readouterr().err
        assert saver.metrics()["checkpoint/waits"] == 1
        assert saver.metrics()["checkpoint/stall_s"] > 0.1
        saver.finish()
        trained_to(run, 3)
        run.save(saver, wait=True)
        assert saver.metrics()["checkpoint/waits"] == 1
        assert capsys.readouterr().err == ""
        assert len(complete_checkpoints(tmp_path)) == 3


def test_a_save_that_cannot_be_completed_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig())
        trained_to(run, 1)
        run.save(saver, wait=True)
        trained_to(run, 2)
        monkeypatch.setattr("kontext_train.training.checkpoint_saver.complete", full)
        with pytest.raises(
            StorageError, match=r"step_00000002 could not be written \(rank 0: OSError: .*No space left"
        ):
            run.save(saver, wait=True)
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_00000001"]


def test_an_old_checkpoint_that_stays_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig(keep_last=1))
        trained_to(run, 1)
        run.save(saver, wait=True)
        trained_to(run, 2)
        monkeypatch.setattr("kontext_train.training.checkpoint_saver.remove", busy)
        run.save(saver, wait=True)
    assert len(complete_checkpoints(tmp_path)) == 2
    assert "an old checkpoint in" in capsys.readouterr().err


def test_a_synchronous_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    with tiny_run() as run:
        saver = Saver(tmp_path, CheckpointConfig(asynchronous=False))
        trained_to(run, 1)
        run.save(saver)
        assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000001"]
        assert saver.copies is None


# -- other meshes --------------------------------------------------------------------------------------------------


def goes_on(folder: Path, steps: int, parallel: dict[str, Any]) -> None:
    """A session on some mesh, which notes the whole tensors that it began and ended with."""
    with tiny_run(**parallel) as run:
        run.resume(folder)
        began = run.digest(whole=True)
        trained_to(run, run.step + steps)
        run.save(Saver(folder, CheckpointConfig(keep_last=10)), wait=True)
        ended = run.digest(whole=True)
    if os.environ["RANK"] == "0":
        with (folder.parent / "digests").open("a") as file:
            print(began, ended, file=file)


def test_meshes_change_and_numbers_do_not(tmp_path: Path) -> None:
    """Weights, moments, step counts and averages, through FSDP, HSDP, context parallelism and one process."""
    hsdp, cp = {"dp_replicate": 2}, {"cp": 2, "dp_replicate": 2}
    folder = tmp_path / "checkpoints"
    for processes, parallel in ((2, {}), (4, hsdp), (3, {}), (4, cp), (1, {}), (2, {"cp": 2})):
        in_processes(processes, goes_on, folder, 2, parallel)
    began, ended = zip(*(line.split() for line in (tmp_path / "digests").read_text().splitlines()), strict=True)
    assert began[1:] == ended[:-1]
    assert len({began[0], *ended}) == 7, "every session changed them"
    shards = {p.name for p in (folder / "step_00000004").glob("*.distcp")}
    assert shards == {f"__{rank}_0.distcp" for rank in range(4)}, "every rank writes, replicas too"


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4 by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    for _ in range(2):
        in_processes(2, goes_on, folder, 2, {})
    return folder


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)


DAMAGES = {
    "flipped": (flip, "has other bytes than were written"),
    "torn": (lambda file: os.truncate(file, file.stat().st_size - 1), r"has \d+ bytes, \d+ when written"),
    "gone": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "record.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_found_by_name(saved: Path, tmp_path: Path, name: str, how: str) -> None:
    path = tmp_path / "step_00000004"
    subprocess.run(["cp", "-r", saved / "step_00000004", path], check=True)
    assert [problem for share in range(2) for problem in damage(path, share, 2)] == []
    do, said = DAMAGES[how]
    do(path / name)
    (found,) = damage(path)
    assert re.fullmatch(f"{name} {said}", found), found
    assert sorted(damage(path, 0, 2) + damage(path, 1, 2)) == [found], "one rank or the other reads it"


@pytest.mark.parametrize("name", ["checksums.json", "COMPLETE"])
def test_damaged_checksums_accuse_no_other_file(saved: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "step_00000004"
    subprocess.run(["cp", "-r", saved / "step_00000004", path], check=True)
    flip(path / name)
    assert damage(path) == ["checksums.json is not what COMPLETE was written for"]


def chosen(folder: Path, resume: str) -> None:
    with tiny_run() as run:
        path = run.resume(folder, resume)
        assert path is not None
        assert path.name == "step_00000002"
        trained_to(run, 4)
        run.save(Saver(folder, CheckpointConfig()), wait=True)


def test_resuming_falls_back_to_the_newest_that_is_whole_and_says_so(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", saved, folder], check=True)
    flip(folder / "step_00000004" / "__1_0.distcp")
    in_processes(2, chosen, folder, "auto")
    assert "step_00000004 is damaged: __1_0.distcp has other bytes than were written" in capfd.readouterr().err
    assert damage(folder / "step_00000004") == [], "the damaged one was replaced when the run came there again"


@pytest.mark.parametrize("resume", ["auto", "step_00000004"])
def test_where_nothing_else_is_whole_it_is_refused_by_name(saved: Path, tmp_path: Path, resume: str) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", saved, folder], check=True)
    for path in complete_checkpoints(folder):
        flip(path / ".metadata")
    given = resume if resume == "auto" else str(folder / resume)
    own = folder if resume == "auto" else tmp_path / "another run"
    last = "step_00000002" if resume == "auto" else resume
    with tiny_run(), pytest.raises(ConfigError, match=rf"run\.resume=.*{last} is damaged: \.metadata has other bytes"):
        newest_whole(given, find_resume(given, own))


# -- what is kept --------------------------------------------------------------------------------------------------


def test_what_is_kept() -> None:
    steps, losses = list(range(1, 11)), {1: 0.5, 3: 0.1, 5: 0.2, 7: 0.3, 10: None}
    assert kept(steps, losses, 10, CheckpointConfig(keep_last=2)) == {9, 10}
    assert kept(steps, losses, 10, CheckpointConfig(keep_last=1, keep_every_steps=4)) == {4, 8, 10}
    assert kept(steps, losses, 10, CheckpointConfig(keep_last=1, keep_best=2)) == {3, 5, 10}
    assert kept(steps, {}, 10, CheckpointConfig(keep_last=1, keep_best=2)) == {10}
    assert kept(steps, losses, 10, CheckpointConfig(keep_last=1, keep_best=2, best_is=Best.highest)) == {1, 7, 10}
    assert kept(steps, losses, 6, CheckpointConfig(keep_last=2)) == {5, 6}, "newer ones were gone back behind"
    nothing = losses | {3: float("nan"), 5: float("-inf")}
    assert kept(steps, nothing, 10, CheckpointConfig(keep_last=1, keep_best=2)) == {1, 7, 10}


def test_a_damaged_record_does_not_keep_everything(saved: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", saved, tmp_path / "run"], check=True)
    flip(tmp_path / "run" / "step_00000002" / "record.json")
    _prune(tmp_path / "run", 4, CheckpointConfig(keep_last=1, keep_best=1))
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["step_00000004"]


# -- disks ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"only root may mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def go_on_until_told(run: TinyRun, saver: Saver) -> None:
    while True:
        run.advance()
        saver.check()


def run_into(folder: Path, disk: Path, spoil: list[str], message: str) -> None:
    """Two saves that go well, one that does not, seen at a later step; two more when the disk is mended."""
    with tiny_run(width=64) as run:
        saver = Saver(folder, CheckpointConfig(keep_last=2))
        for _ in range(2):
            trained_to(run, run.step + 1)
            run.save(saver, wait=True)
        whole = trained_to(run, 2)
        dist.barrier()
        if dist.get_rank() == 0:
            subprocess.run(spoil, check=True, stderr=subprocess.DEVNULL)
        dist.barrier()
        trained_to(run, 3)
        run.save(saver)
        with pytest.raises(StorageError, match=message):
            go_on_until_told(run, saver)
        assert [p.name for p in complete_checkpoints(folder)] == ["step_00000001", "step_00000002"]
        assert all(damage(path) == [] for path in complete_checkpoints(folder))
        dist.barrier()
        if dist.get_rank() == 0:
            subprocess.run(["mount", "-o", "remount,rw,size=100m", disk], check=True)
        dist.barrier()
        run.resume(folder)
        assert run.digest() == whole
        trained_to(run, 3)
        run.save(Saver(folder, CheckpointConfig(keep_last=2)), wait=True)
        assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_spoilt_disk_is_named_and_earlier_checkpoints_stay(tmp_path: Path, how: str) -> None:
    with small_disk(tmp_path / "disk", "10m") as disk:
        folder = disk / "checkpoints"
        spoil, message = {
            "full": (
                ["mount", "-o", "remount,size=500k", disk],
                rf"{folder}/step_00000003 could not be written \(.*rank 1: OSError: \[Errno 28\] No space left",
            ),
            "read-only": (
                ["mount", "-o", "remount,ro", disk],
                rf"{folder}/step_00000003 could not be written \(rank 0: OSError: \[Errno 30\] Read-only file system",
            ),
        }[how]
        in_processes(2, run_into, folder, disk, spoil, message)


@pytest.mark.parametrize("room", ["40k", "100k", "200k", "400k", "700k"])
def test_a_disk_that_fills_within_any_file_is_called_full(tmp_path: Path, room: str) -> None:
    """torch's archive writer has words of its own for the error that its file raised."""
    with small_disk(tmp_path / "disk", room) as disk, tiny_run(width=256) as run:
        run.advance()
        saver = Saver(disk / "run", CheckpointConfig())
        with pytest.raises(
            StorageError, match=r"step_00000001 could not be written \(rank 0: OSError: \[Errno 28\] No"
        ):
            run.save(saver, wait=True)
        assert list((disk / "run").iterdir()) == []


def test_a_disk_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        config = CheckpointConfig(folder=str(disk / "run"))
        with tiny_run(), pytest.raises(ConfigError, match=r"checkpoint\.folder=.*rank 0 cannot write to .*Read-only"):
            Saver(disk / "run", config)


# -- object stores -------------------------------------------------------------------------------------------------


def run_remotely(url: str) -> None:
    folder = place(url)
    with tiny_run() as run:
        run.resume(folder)
        saver = Saver(folder, CheckpointConfig(folder=url, keep_last=2))
        for _ in range(3):
            trained_to(run, run.step + 1)
            run.save(saver)
        saver.finish()
        found = complete_checkpoints(folder)
        assert [p.name for p in found] == [f"step_{run.step - 1:08d}", f"step_{run.step:08d}"]
        assert [damage(path) for path in found] == [[], []]
        before = run.digest()
        run.resume(folder)
        assert run.digest() == before
        dist.barrier()
        if dist.get_rank() == 0:
            (found[-1] / "__0_0.distcp").write_bytes(b"other")
            (found[-2] / ".metadata").unlink()
        dist.barrier()
        (problem,) = damage(found[-1])
        assert re.fullmatch(r"__0_0\.distcp has 5 bytes, \d+ when written", problem)
        assert damage(found[-2]) == [".metadata is missing"]


def test_checkpoints_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        subprocess.run(
            [sys.executable, "-c", f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"],
            check=True,
        )
        in_processes(2, run_remotely, f"s3://{BUCKET}/runs/first")
