# Every command that NBD has, and what it has to leave behind. Run by nbd_clients.rs on a new volume of 64 MiB.
import os
MiB = 1 << 20
assert h.get_size() == 64 * MiB
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
assert h.can_cache() and h.can_multi_conn() and not h.is_read_only() and not h.is_rotational()
assert h.get_structured_replies_negotiated() and h.can_meta_context('base:allocation')

def extents(at, n):
    found = []
    def entry(context, offset, entries, error):
        assert context == 'base:allocation' and offset == at
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(n, at, entry)
    return found

def holes(at, n):
    covered, kinds = 0, set()
    while covered < n:
        for length, kind in extents(at + covered, n - covered):
            covered += length
            kinds.add(kind)
    return kinds

# Write and read, at any byte, small and as large as may be.
one, odd, large = os.urandom(4096), os.urandom(7001), os.urandom(32 * MiB)
h.pwrite(one, 4096)
h.pwrite(odd, 12345)
assert h.pread(4096, 4096) == one and h.pread(7001, 12345) == odd
h.pwrite(large, 16 * MiB)
assert h.pread(32 * MiB, 16 * MiB) == large
h.pwrite(b'end', 64 * MiB - 3)
assert h.pread(4, 64 * MiB - 4)[1:] == b'end'

# Forced unit access with all that changes, and a flush.
h.pwrite(one, MiB, nbd.CMD_FLAG_FUA)
assert h.pread(4096, MiB) == one
h.zero(4096, MiB, nbd.CMD_FLAG_FUA)
assert h.pread(4096, MiB) == bytes(4096)
h.trim(4096, MiB, nbd.CMD_FLAG_FUA)
h.flush()

# In pieces, as a structured reply may be; in one, as DF wants it.
got = bytearray(MiB)
def chunk(data, offset, status, error):
    assert status == nbd.READ_DATA or status == nbd.READ_HOLE
    got[offset - 16 * MiB:offset - 16 * MiB + len(data)] = data
h.pread_structured(MiB, 16 * MiB, chunk)
assert got == large[:MiB]
calls = []
h.pread_structured(65536, 16 * MiB, lambda data, *rest: calls.append(len(data)), nbd.CMD_FLAG_DF)
assert calls == [65536], calls

# Trimmed: a hole that reads as zeros. Zeroed: zeros, a hole unless that was forbidden.
assert holes(16 * MiB, 4 * MiB) == {0}
h.trim(4 * MiB, 16 * MiB)
h.flush()
assert h.pread(4 * MiB, 16 * MiB) == bytes(4 * MiB)
assert holes(16 * MiB, 4 * MiB) == {nbd.STATE_HOLE | nbd.STATE_ZERO}
assert h.pread(4 * MiB, 20 * MiB) == large[4 * MiB:8 * MiB]
h.zero(4 * MiB, 20 * MiB)
assert h.pread(4 * MiB, 20 * MiB) == bytes(4 * MiB)
h.zero(4 * MiB, 24 * MiB, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4 * MiB, 24 * MiB) == bytes(4 * MiB)
assert holes(24 * MiB, 4 * MiB) <= {nbd.STATE_ZERO, nbd.STATE_HOLE | nbd.STATE_ZERO, 0}
try:
    h.zero(4 * MiB, 28 * MiB, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(4 * MiB, 28 * MiB) == bytes(4 * MiB)
except nbd.Error as e:
    assert e.errno == 'EOPNOTSUPP' or e.errno == 'ENOTSUP', e
    assert h.pread(4 * MiB, 28 * MiB) == large[12 * MiB:16 * MiB]
h.zero(1000, 32 * MiB + 1)
assert h.pread(1002, 32 * MiB) == large[16 * MiB:16 * MiB + 1] + bytes(1000) + large[16 * MiB + 1001:16 * MiB + 1002]

# What is not one whole block is trimmed or left, and its neighbours are left in any case.
h.trim(100, 40 * MiB + 1)
assert h.pread(1, 40 * MiB) + h.pread(100, 40 * MiB + 101) == large[24 * MiB:24 * MiB + 1] + large[24 * MiB + 101:24 * MiB + 201]

# What is to be read soon.
h.cache(MiB, 16 * MiB)
h.cache(65536, 64 * MiB - 65536)

# One extent, when one is asked for.
h.block_status(64 * MiB, 0, lambda c, o, entries, e: calls.append(len(entries)), nbd.CMD_FLAG_REQ_ONE)
assert calls[1:] == [2], calls

# Many at once, answered in any order.
cookies = {h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n]) * 4096), n * 4096): n for n in range(64)}
while h.aio_in_flight():
    h.poll(1000)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
for n in range(64):
    assert h.pread(4096, n * 4096) == bytes([n]) * 4096
h.flush()
h.shutdown()
