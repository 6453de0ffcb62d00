use std::{os::fd::AsFd, path::PathBuf, thread};

use everdisk_sys::packet;

use super::*;

/// Listens like an interface or a core and gives one answer.
fn scripted<S, R>(answer: Option<S>) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<R>)
where
    S: Body + Send + 'static,
    R: Body + Send + 'static,
{
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = packet::listen(&path).unwrap();
    let server = thread::spawn(move || {
        let link: Link<S, R> = Link::new(packet::accept(listener.as_fd()).unwrap());
        let (frame, _) = link.recv().unwrap();
        if let Some(answer) = answer {
            link.send(frame.id, answer, &[]).unwrap();
        }
        frame.body
    });
    (dir, path, server)
}

/// A volume's file whose mount is called so.
fn file(source: &str) -> FileAttach {
    let source = Some(source.to_owned());
    FileAttach { path: "/srv/v".into(), mode: 0o600, uid: 0, gid: 0, allow_other: false, source, target: None }
}

#[test]
fn a_busy_file_is_told_from_other_failures_and_a_closed_socket_is_a_detach_where_nothing_is_mounted() {
    let gone = file("everdisk:v:gone");
    let failed = |busy| FromInterface::Answer(Answer::Failed { reason: "why".to_owned(), busy });
    let (_dir, path, server) = scripted::<_, ToInterface>(Some(failed(true)));
    assert!(matches!(Interface(&path).detach(false, Some(&gone)), Err(NotDetached::InUse(_))));
    assert_eq!(server.join().unwrap(), ToInterface::Request(Request::Detach { force: false }));
    let (_dir, path, _server) = scripted::<_, ToInterface>(Some(failed(false)));
    assert!(matches!(Interface(&path).detach(true, Some(&gone)), Err(NotDetached::Other(_))));
    let (_dir, path, _server) = scripted::<FromInterface, ToInterface>(None);
    assert!(Interface(&path).detach(true, Some(&gone)).is_ok());
    let (_dir, path, _server) = scripted::<FromInterface, ToInterface>(None);
    assert!(matches!(Interface(&path).detach(true, None), Err(NotDetached::Other(_))), "its cores may serve on");
    // Any mount that is there stands for the volume's.
    let mounted = file(&everdisk_sys::mounts::all().unwrap()[0].source);
    let (_dir, path, _server) = scripted::<FromInterface, ToInterface>(None);
    assert!(matches!(Interface(&path).detach(false, Some(&mounted)), Err(NotDetached::Other(_))));
}

#[test]
fn wrong_answers_and_refusals_are_errors() {
    let (_dir, path, _server) = scripted::<_, ToInterface>(Some(FromInterface::Answer(Answer::Done)));
    assert!(Interface(&path).status().is_err());
    let refused = FromInterface::Refused { reason: "not you".to_owned() };
    let (_dir, path, _server) = scripted::<_, ToInterface>(Some(refused));
    assert!(Interface(&path).resume().unwrap_err().to_string().contains("not you"));
    let (_dir, path, _server) = scripted::<_, CoreRequest>(Some(CoreAnswer::Verified { blocks: 3 }));
    assert_eq!(Core(&path).verify(3, PEER_DEADLINE).unwrap(), 3);
    let (_dir, path, _server) = scripted::<_, CoreRequest>(Some(CoreAnswer::Failed { reason: "disk".to_owned() }));
    let mut flush = Core(&path).flush().unwrap();
    flush.ask(PEER_DEADLINE).unwrap();
    assert_eq!(flush.answer(PEER_DEADLINE).unwrap_err().to_string(), "disk");
    let (_dir, path, _server) = scripted::<_, CoreRequest>(Some(CoreAnswer::Following { buffered_bytes: 7 }));
    assert_eq!(Core(&path).follow(PEER_DEADLINE).unwrap(), 7);
    assert!(Core(Path::new("/nowhere")).nodes().is_err());
}
