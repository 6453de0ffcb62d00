//! Large replies, whose data goes directly to the socket, beside other requests.

use super::*;

#[test]
fn beyond4_a_large_reply_that_begins_while_a_long_write_ends_does_not_end_the_connection() {
    let mut team = Team::new(2, false);
    team.disk.hold(0);
    team.disk.hold(2 << 20);
    team.send(cmd::READ, 1, 0, 300_000, b"");
    team.disk.await_request(0);
    team.lead(1);
    // Its second piece is held.
    team.send(cmd::WRITE, 2, 1 << 20, (1 << 20) + 5000, &vec![7; (1 << 20) + 5000]);
    team.disk.await_request(2 << 20);
    team.disk.release(0);
    until("the large reply is under way", || team.connection.lock().record.direct.is_some());
    team.disk.release(2 << 20);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(team.reply(), (1, 0));
    team.read(300_000);
    assert_eq!(team.reply(), (2, 0));
}

#[test]
fn beyond4_every_worker_ends_when_the_client_goes_in_the_middle_of_a_large_reply() {
    let mut team = Team::new(2, false);
    team.disk.hold(0);
    team.send(cmd::READ, 1, 0, 300_000, b"");
    team.disk.await_request(0);
    team.lead(1);
    until("the leader works", || ticket::may_be_reading(team.state(1)));
    team.disk.release(0);
    until("the large reply is under way", || team.connection.lock().record.direct.is_some());
    team.client.shutdown(std::net::Shutdown::Both).unwrap();
    until("every worker has ended", || team.workers.iter().flatten().all(JoinHandle::is_finished));
}

#[test]
fn beyond4_a_large_reply_that_fails_between_chunks_takes_nothing_back() {
    let mut team = Team::new(3, true);
    let (a, b) = (0, 3 << 20);
    team.disk.hold(a);
    team.disk.hold(a + (1 << 20));
    team.disk.hold(b);
    team.disk.with(|node| node.bad.insert(a + (1 << 20)));
    team.send(cmd::READ, 1, a, 2 << 20, b"");
    team.disk.await_request(a);
    team.lead(1);
    team.send(cmd::READ, 2, b, 4096, b"");
    team.disk.await_request(b);
    team.disk.release(a);
    let (_, kind, cookie, data) = team.chunk();
    assert_eq!((kind, cookie, data.len()), (1, 1, 8 + (1 << 20)));
    team.disk.await_request(a + (1 << 20));
    team.lead(2);
    until("the other is put aside", || team.connection.lock().record.aside.count_ones() == 2);
    team.disk.release(a + (1 << 20));
    let (flags, kind, cookie, _) = team.chunk();
    assert_eq!((flags, kind, cookie), (1, (1 << 15) + 2, 1));
    team.disk.release(b);
    let (flags, kind, cookie, data) = team.chunk();
    assert_eq!((flags, kind, cookie, data.len()), (1, 1, 2, 8 + 4096));
    team.send(cmd::WRITE, 3, 0, 1, b"x");
    assert_eq!(team.reply(), (3, 0), "one reply to each request");
}

/// The rest of a reply is sent although a piece of a long write hangs, for whose end the connection waits.
#[test]
fn beyond4_the_rest_of_a_reply_is_sent_while_a_long_write_hangs() {
    let mut team = Team::new(3, false);
    team.disk.hold(0);
    team.send(cmd::READ, 1, 0, 60_000, b"");
    team.disk.await_request(0);
    team.lead(1);
    until("it was put aside", || team.connection.lock().record.aside != 0);
    team.disk.hold(1 << 20);
    team.send(cmd::WRITE, 2, 1 << 20, (1 << 20) + 5000, &vec![7; (1 << 20) + 5000]);
    team.disk.await_request(1 << 20);
    team.lead(2);
    thread::sleep(Duration::from_millis(20));
    team.disk.release(0);
    assert_eq!(team.reply(), (1, 0));
    team.read(60_000);
    team.disk.release(1 << 20);
    assert_eq!(team.reply(), (2, 0));
}

/// A slow client takes one large reply after the other. Requests that wait for their turn keep what they have read.
#[test]
fn beyond4_large_reads_are_not_read_again_while_the_client_takes_replies() {
    let mut team = Team::new(12, false);
    reads_at_the_node(&mut team, 12, 300_000);
    let before = team.disk.with(|node| node.visits);
    team.disk.with(|node| node.held.clear());
    let mut left = 12 * 300_016;
    while left > 0 {
        let len = left.min(10_000);
        team.read(len);
        left -= len;
        thread::sleep(Duration::from_micros(500));
    }
    let again = team.disk.with(|node| node.visits) - before;
    assert!(again <= 6, "{again} of 12");
}
