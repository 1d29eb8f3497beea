"""Injected faults: each function patches the calling process before its run begins."""

import errno
import os
import signal
import time

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError

from recurrent_bart.checkpointing import checkpoint_files
from recurrent_bart.data.batches import Collator
from recurrent_bart.evaluation.evaluator import Evaluator
from recurrent_bart.training import session
from recurrent_bart.training.trainer import Trainer

# Functions before which a fault can happen.
MOMENTS = {
    "step": (Trainer, "forward_backward"),
    "evaluation": (Evaluator, "_generate"),
    "save": (DeepSpeedEngine, "save_checkpoint"),
    "update": (DeepSpeedEngine, "step"),
}


def before(moment, act, at=1):
    """Call `act` before the `at`-th call of a function in `MOMENTS`."""
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    times = [0]

    def patched(*args, **options):
        times[0] += 1
        if times[0] == at:
            act()
        return original(*args, **options)

    setattr(owner, name, patched)


def signalled(moment, number, at=1, n_times=1):
    """Send a signal `n_times` to this process."""

    def send():
        for _ in range(n_times):
            os.kill(os.getpid(), number)

    before(moment, send, at)


def signalled_before_training():
    """Send SIGTERM while documents are tokenised."""
    from recurrent_bart.training import preparation

    load_corpus = preparation.load_corpus

    def signalled_first(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return load_corpus(*args, **options)

    preparation.load_corpus = signalled_first


def signalled_then_while_saving(number):
    """Send a signal in a step, and again while the requested checkpoint is written."""
    before("step", lambda: os.kill(os.getpid(), number), at=3)
    # The first save belongs to the evaluation after two steps.
    before("save", lambda: os.kill(os.getpid(), number), at=2)


def workers_signalled(numbers):
    """Send signals to the DataLoader workers, as SLURM does to all processes of a job step."""
    import psutil

    def send():
        children = psutil.Process().children()
        assert children
        for child in children:
            for number in numbers:
                child.send_signal(number)

    before("step", send, at=2)


def worker_killed():
    """Kill a DataLoader worker, as the kernel does if memory runs out."""
    import psutil

    before("step", lambda: psutil.Process().children()[0].kill(), at=2)


def stop_file_appears(path, at):
    """Create the stop file."""
    before("step", lambda: open(path, "w").close(), at)


def killed(moment, at=1):
    """Kill this process."""
    before(moment, lambda: os.kill(os.getpid(), signal.SIGKILL), at)


def hangs(moment, at=1, seconds=1000):
    """Block this process for some seconds."""
    before(moment, lambda: time.sleep(seconds), at)


def fails(moment, at=1):
    """Raise an unexpected exception."""

    def fail():
        raise RuntimeError("nobody foresaw this")

    before(moment, fail, at)


def out_of_memory(moment, at=1):
    """Raise an out-of-memory error of the device."""

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    before(moment, fail, at)


def out_of_memory_backward(at):
    """Raise an out-of-memory error in a backward pass, after some micro-batches of the step."""
    backward, times = DeepSpeedEngine.backward, [0]

    def patched(engine, loss):
        times[0] += 1
        if times[0] == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return backward(engine, loss)

    DeepSpeedEngine.backward = patched


def loss_becomes(value, steps):
    """Multiply the loss of some steps by a value; steps count from 1."""
    forward = DeepSpeedEngine.forward
    times = [0]

    def patched(engine, *args, **options):
        output = forward(engine, *args, **options)
        if engine.training:
            times[0] += 1
            if times[0] in steps:
                output.loss = output.loss * value
        return output

    DeepSpeedEngine.forward = patched


def gradient_becomes(value, step):
    """Multiply the gradient of a step by a value; the loss stays finite."""
    backward, times = DeepSpeedEngine.backward, [0]

    def patched(engine, loss):
        times[0] += 1
        if times[0] == step:
            loss.register_hook(lambda gradient: gradient * value)
        return backward(engine, loss)

    DeepSpeedEngine.backward = patched


def disk_full(from_checkpoint):
    """Fail each write to checkpoint files, from one checkpoint on."""
    write = checkpoint_files.write_and_fsync
    full = [False]

    def fill():
        full[0] = True

    def patched(path, writer):
        if not full[0]:
            return write(path, writer)

        def writer_on_full_disk(file):
            file.write(b"a part of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        return write(path, writer_on_full_disk)

    before("save", fill, at=from_checkpoint)
    checkpoint_files.write_and_fsync = patched


def writing_fails(what, at):
    """Fail the `at`-th write of another file with a full disk."""
    write, times = getattr(session, what), [0]

    def patched(*args, **options):
        times[0] += 1
        if times[0] < at:
            return write(*args, **options)
        # The writer of weights raises its own exception type.
        kind = SafetensorError if what == "save_model" else OSError
        raise kind("I/O error: No space left on device (os error 28)")

    setattr(session, what, patched)


def disk_full_and_signalled():
    """Fill the disk when a checkpoint is requested."""
    disk_full(from_checkpoint=2)
    before("step", lambda: os.kill(os.getpid(), signal.SIGTERM), at=3)


def folder_becomes_a_file(path, at):
    """Replace the checkpoint folder by a file, which even root cannot write into."""

    def replace():
        path.rename(path.with_name("away"))
        path.touch()

    before("step", replace, at)


def document_unreadable(index):
    """Fail the collation of one document."""
    segments = Collator.segments

    def patched(collator, row):
        if row["index"] == index:
            raise ValueError("its sections are damaged")
        return segments(collator, row)

    Collator.segments = patched
