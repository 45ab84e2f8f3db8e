"""Takes all there is of one thing inside, and says where it ended."""

import ctypes
import errno
import os
import tempfile


def until_refused(take):
    taken = []
    try:
        for _ in range(200_000):
            taken.append(take())
    except OSError as error:
        return [len(taken), errno.errorcode[error.errno]]
    finally:
        for descriptor in taken:
            if isinstance(descriptor, int):
                os.close(descriptor)
    return [len(taken), None]


def files():
    return until_refused(lambda: os.open("/dev/null", os.O_RDONLY))


def inotify():
    libc = ctypes.CDLL(None, use_errno=True)

    def take():
        descriptor = libc.inotify_init()
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        return descriptor

    return until_refused(take)


def pipes():
    import fcntl

    def take():
        reader, writer = os.pipe()
        os.close(reader)
        fcntl.fcntl(writer, 1031, 1 << 20)
        return writer

    return until_refused(take)


def space(where="/tmp"):
    block = b"x" * (1 << 20)
    path = os.path.join(where, "full")
    try:
        with open(path, "wb", buffering=0) as file:
            return until_refused(lambda: file.write(block) and None)
    finally:
        os.unlink(path)


def shm():
    return space("/dev/shm")


def inodes():
    folder = tempfile.mkdtemp()

    try:
        return until_refused(lambda: made(folder))
    finally:
        import shutil

        shutil.rmtree(folder)


def made(folder, counter=iter(range(10**9))):
    with open(f"{folder}/{next(counter)}", "x"):
        return None


def zombies():
    """A thousand children that nobody waits for; those of dead parents are pid 1's to bury."""
    for _ in range(1000):
        pid = os.fork()
        if pid == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.waitpid(pid, 0)
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    found += file.read().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                pass
    return found


def oom_score():
    told = []
    for value in ("-1000", "0", "499"):
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(value)
            told.append("lowered")
        except OSError as error:
            told.append(errno.errorcode[error.errno])
    with open("/proc/self/oom_score_adj") as file:
        return [told, int(file.read())]


WAYS = dict(globals())


def handler(event, context):
    return WAYS[event]()
