//! Clients that do not read, or send everything before they do: replies wait for room.

use super::*;

/// A client that reads no replies for a while ties up no worker: other clients are served by them in that time. It
/// misses no reply afterwards.
#[test]
fn beyond4_a_client_that_does_not_read_keeps_no_worker_but_the_leader() {
    const REQUESTS: u64 = 40;
    for len in [4096, 30_000, 60_000] {
        let mut team = Team::new(6, false);
        let offsets = || (0..6_u64).map(|n| n << 16);
        team.disk.with(|node| node.is_known_to_be_slow = true);
        offsets().for_each(|offset| team.disk.hold(offset));
        offsets().for_each(|offset| team.send(cmd::READ, offset, offset, len, b""));
        until("six are at the node", || team.disk.with(|node| offsets().all(|offset| node.there.contains(&offset))));
        // They come back at the same time, and there is not room for all of the largest.
        team.disk.with(|node| node.held.clear());
        (1..=REQUESTS).for_each(|cookie| team.send(cmd::READ, cookie, cookie * 4096, len, b""));
        let is_full = |team: &Team| team.connection.unsent(&team.connection.lock().record) > 50_000;
        let at_work = |team: &Team| (0..6).filter(|worker| team.is_at_work(*worker)).count();
        until("the output fills", || is_full(&team) && at_work(&team) <= 1);
        thread::sleep(Duration::from_millis(60));
        assert!(is_full(&team) && at_work(&team) <= 1, "{len}");
        let mut left: HashSet<u64> = offsets().chain(1..=REQUESTS).collect();
        while !left.is_empty() {
            let (cookie, error) = team.reply();
            assert!(left.remove(&cookie) && error == 0, "{cookie}");
            team.read(len as usize);
        }
    }
}

#[test]
fn beyond7_a_client_that_says_everything_before_it_reads_is_heard() {
    let mut team = Team::new(1, false);
    let before = team.connection.memory().received();
    for cookie in 0..20 {
        team.send(cmd::READ, cookie, 0, 60_000, b"");
    }
    until("the output is full", || {
        let record = team.connection.lock().record;
        team.connection.unsent(&record) > 100_000
    });
    for cookie in 20..40 {
        team.send(cmd::READ, cookie, 0, 60_000, b"");
    }
    until("the rest is received", || team.connection.memory().received() == before + 40 * 28);
    for cookie in 0..40 {
        assert_eq!(team.reply(), (cookie, 0));
        team.read(60_000);
    }
}

/// A request that had no room is retried when there is room: a client that has sent everything gets every reply.
#[test]
fn beyond7_a_client_that_half_closes_gets_every_reply() {
    let mut team = Team::new(1, false);
    rustix::net::sockopt::set_socket_send_buffer_size(team.connection.socket(), 400_000).unwrap();
    for cookie in 0..40 {
        team.send(cmd::READ, cookie, 0, 60_000, b"");
    }
    until("the output is full", || team.connection.unsent(&team.connection.lock().record) > 184 << 10);
    team.client.shutdown(std::net::Shutdown::Write).unwrap();
    until("it is over", || team.connection.lock().is_over);
    let mut all = Vec::new();
    team.client.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 40 * 60_016);
}

/// The same where room was reserved for replies that are still to come.
#[test]
fn beyond7_beyond4_a_client_that_half_closes_gets_every_reply_of_a_slow_node() {
    let mut team = Team::new(6, false);
    reads_at_the_node(&mut team, 4, 60_000);
    team.disk.with(|node| node.is_known_to_be_slow = false);
    let mut bytes = Vec::new();
    request(&mut bytes, cmd::FLUSH, 0, 0, 0, b"");
    request(&mut bytes, cmd::READ, 0, 9 << 16, 4096, b"");
    team.client.write_all(&bytes).unwrap();
    team.client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut first = [0; 16];
    team.client.read_exact(&mut first).unwrap();
    team.disk.with(|node| node.held.clear());
    let mut all = Vec::new();
    team.client.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 4 * 60_016 + 4112);
}

/// A leader whose own reply finds no room goes on receiving: the client may send everything before it reads.
#[test]
fn beyond4_beyond7_a_leader_without_room_for_its_reply_hears_the_client() {
    let mut team = Team::new(6, false);
    reads_at_the_node(&mut team, 5, 60_000);
    team.disk.with(|node| node.is_known_to_be_slow = false);
    team.disk.hold(9 << 16);
    team.send(cmd::READ, 9, 9 << 16, 60_000, b"");
    team.disk.await_request(9 << 16);
    (0..5).for_each(|n| team.disk.release(n << 16));
    until("the output fills", || team.connection.unsent(&team.connection.lock().record) > 200_000);
    team.disk.release(9 << 16);
    thread::sleep(Duration::from_millis(60));
    let mut bytes = Vec::new();
    for _ in 0..40 {
        request(&mut bytes, cmd::WRITE, 0, 2 << 20, 30_000, &vec![7; 30_000]);
    }
    team.client.write_all(&bytes).unwrap();
    let mut read = vec![0; 6 * 60_016 + 40 * 16];
    team.client.read_exact(&mut read).unwrap();
}
