//! No part of a connection's rings is reused too early.

use super::*;

/// The data of a write that was put aside stays in the input ring, however much the client sends after it: the worker
/// that carries the write out again finds it there.
#[test]
fn beyond7_beyond4_what_is_received_behind_a_write_put_aside_leaves_its_data_alone() {
    const LEN: usize = 700_000;
    let mut team = Team::new(2, false);
    team.disk.hold(0);
    let data: Vec<u8> = (0..LEN).map(|i| u8::try_from(i % 241).unwrap() + 1).collect();
    team.send(cmd::WRITE, 1, 0, u32::try_from(LEN).unwrap(), &data);
    team.disk.await_request(0);
    team.lead(1);
    // One by one, so that nothing else is in the ring in between; then more than it holds.
    for cookie in 2..40_u64 {
        team.send(cmd::WRITE, cookie, 2 << 20, 20_000, &vec![0xee; 20_000]);
        assert_eq!(team.reply(), (cookie, 0));
    }
    assert_eq!(team.connection.lock().record.aside.count_ones(), 1, "it was put aside");
    let mut client = team.client.try_clone().unwrap();
    let more = thread::spawn(move || {
        let mut bytes = Vec::new();
        (0..60).for_each(|_| request(&mut bytes, cmd::WRITE, 0, 3 << 20, 40_000, &vec![0xdd; 40_000]));
        client.write_all(&bytes).unwrap();
    });
    until("the ring is full", || !team.connection.has_room(&team.connection.lock().record) || more.is_finished());
    team.set_gate(Mode::Closed);
    until("the leader is in", || team.is_out_of_poll(1));
    team.disk.release(0);
    until("the writer has given up", || !team.is_at_work(0));
    // The write is repeated.
    team.disk.file.0.write_all_at(&vec![0; LEN], 0).unwrap();
    team.set_gate(Mode::Open);
    let mut first = None;
    for _ in 0..61 {
        let (cookie, error) = team.reply();
        assert_eq!(error, 0);
        first = first.or((cookie == 1).then_some(()));
    }
    more.join().unwrap();
    assert!(first.is_some(), "the write that was put aside is answered");
    let mut found = vec![0; LEN];
    team.disk.file.0.read_exact_at(&mut found, 0).unwrap();
    assert!(found == data, "the data of the write that was put aside was overwritten in the ring");
}
