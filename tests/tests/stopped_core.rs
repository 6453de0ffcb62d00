//! A core that is stopped in the middle of a request: no other core may execute what it may still execute.

use std::time::{Duration, Instant};

use everdisk_proto::frame::{Answer, FromInterface, GateState, InterfaceStatus, Request, ToInterface};
use everdisk_sys::link::Link;
use everdisk_tests::{host::Host, load::Load, processes, volume::Volume, wait::until};

type Interface = Link<ToInterface, FromInterface>;

fn interface(volume: &Volume<'_>) -> Option<Interface> {
    Interface::connect(&volume.host.volume_run("v").join("interface.sock")).ok()
}

fn look(volume: &Volume<'_>) -> Option<InterfaceStatus> {
    let answer = interface(volume)?.ask(ToInterface::Request(Request::Status), Duration::from_secs(2)).ok()?;
    let FromInterface::Answer(Answer::Status(status)) = answer else { return None };
    Some(*status)
}

/// D3, D6: the serving core is stopped in a request, a hand-over waits for it, and the interface is killed. The new interface
/// may not give the request out again as long as the stopped core lives; when it runs again, I/O goes on.
#[test]
fn d6_what_a_stopped_core_may_still_execute_is_given_to_nobody() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 4);
    let before = volume.settled();
    let (core, standby) = (before.core().unwrap(), before.standby().unwrap());
    let frozen = until("the core is stopped in a request", || {
        load.goes_on(1);
        let frozen = processes::freeze(core);
        look(&volume).is_some_and(|status| status.in_flight > 0).then_some(frozen)
    });
    let hand_over = ToInterface::Request(Request::Handover { to: standby, budget_ms: 5000 });
    interface(&volume).unwrap().send(1, hand_over, &[]).unwrap();
    // Once it drains it answers no request: then the gate is closed.
    let asks = || interface(&volume)?.ask(ToInterface::Request(Request::Status), Duration::from_millis(300)).ok();
    until("the interface drains", || asks().is_none().then_some(()));
    let closed = Instant::now();
    processes::kill(before.interface().unwrap());
    let restored = until("a new interface", || look(&volume).filter(|s| Some(s.pid) != before.interface()));
    assert_eq!(restored.gate, GateState::Recovering, "{restored:?}");
    // Several attempts to give the gate to the standby fall into this time.
    while closed.elapsed() < Duration::from_secs(4) {
        if let Some(now) = look(&volume) {
            let other = now.cores.iter().find(|c| c.pid == standby).unwrap();
            assert_eq!((now.gate, other.requests), (GateState::Recovering, 0), "{now:?}");
        }
    }
    drop(frozen);
    volume.wait("recovery", |status| status.serves());
    load.goes_on(100);
    load.stop();
    volume.settled();
    volume.turn();
    volume.detach();
}
