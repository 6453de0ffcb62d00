# Many connections are one disk: what one has written another makes durable and a third one reads. Run by nbd_clients.rs
# with `uris`, the volume's exports.
import os
a, b, c = [handle(uri) for uri in (uris * 3)[:3]]
assert a.can_multi_conn()
for n in range(50):
    data = os.urandom(20000)
    a.pwrite(data, n * 100000 + 1)
    b.flush()
    assert c.pread(20000, n * 100000 + 1) == data
    c.pwrite(data[::-1], n * 100000 + 50000, nbd.CMD_FLAG_FUA)
    assert a.pread(20000, n * 100000 + 50000) == data[::-1]
    b.trim(20000, n * 100000 + 1)
    a.flush()
    b.zero(1000, n * 100000 + 50000)
    assert c.pread(1000, n * 100000 + 50000) == bytes(1000)
for connection in a, b, c:
    connection.shutdown()
