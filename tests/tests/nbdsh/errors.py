# Everything that has to fail, by libnbd without its own checks; whatever fails, the volume is as before. Run by
# nbd_clients.rs on a new volume of 64 MiB.
MiB = 1 << 20
size = h.get_size()
h.pwrite(b'x' * 65536, size - 65536)
h.set_strict_mode(0)
def good():
    assert h.pread(65536, size - 65536) == b'x' * 65536

past = [(size, 1), (size - 1, 2), (size - 4096, 8192), (size + 4096, 4096), ((1 << 63) - 4096, 4096), ((1 << 64) - 4096, 8192), ((1 << 64) - 1, 1)]
for offset, n in past:
    fails('EINVAL', h.pread, n, offset)
    fails('ENOSPC EINVAL', h.pwrite, b'y' * n, offset)
    fails('EINVAL ENOSPC', h.trim, n, offset)
    fails('ENOSPC EINVAL', h.zero, n, offset)
    fails('EINVAL', h.cache, n, offset)
    fails('EINVAL', h.block_status, n, offset, lambda *a: 0)
    good()

# Flags that do not exist, or not with this command.
for flag in (1 << 5, 1 << 9, 1 << 15):
    fails('EINVAL', h.pread, 512, 0, flag)
    fails('EINVAL', h.pwrite, b'z' * 512, 0, flag)
    fails('EINVAL', h.flush, flag)
    fails('EINVAL', h.trim, 512, 0, flag)
    fails('EINVAL', h.zero, 512, 0, flag)
    fails('EINVAL', h.cache, 512, 0, flag)
    fails('EINVAL', h.block_status, 512, 0, lambda *a: 0, flag)
    good()
for flag in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO):
    fails('EINVAL', h.pread, 512, 0, flag)
    fails('EINVAL', h.pwrite, b'z' * 512, 0, flag)
fails('EINVAL', h.pwrite, b'z' * 512, 0, nbd.CMD_FLAG_DF)
fails('EINVAL', h.zero, 512, 0, nbd.CMD_FLAG_DF)
good()
assert h.pread(512, 0) == bytes(512)

# Nothing at all: the protocol leaves it open, it must do no harm.
for n, f in enumerate([lambda: h.pread(0, 4096), lambda: h.pwrite(b'', 4096), lambda: h.trim(0, 4096), lambda: h.zero(0, 4096), lambda: h.cache(0, 4096), lambda: h.block_status(0, 4096, lambda *a: 0)]):
    try:
        f()
    except nbd.Error as e:
        assert e.errno == 'EINVAL', (n, e)
    good()

# The largest that may be, and one byte more.
assert len(h.pread(32 * MiB, 0)) == 32 * MiB
fails('EINVAL EOVERFLOW ENOMEM', h.pread, 32 * MiB + 1, 0)
good()
h.shutdown()
