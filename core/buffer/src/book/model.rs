//! Loom: a core that appends, sends and reuses slots and ring, and a standby that follows meanwhile.

use loom::{sync::Arc, thread};

use super::*;
use crate::testing::LoomArea;

fn append(book: &mut Book, area: &LoomArea, offset: u64, value: u64) {
    let place = book.reserve(area, ExtentKind::Data, 8).unwrap();
    let data = value.to_le_bytes();
    let (kind, crc) = (ExtentKind::Data, crc32c::crc32c(&data));
    let extent = Extent { kind, offset, len: 8, position: place.position, generation: 1, crc };
    log::publish(area, place.seq, &extent, &data);
    book.published(area, place.seq, &extent);
}

/// D3, D4: whatever the interleaving, a follower takes in only what stands: never a half-written extent, never one whose
/// memory was used again while it was read, and it finds no damage where there is none. Taken over afterwards, it has the
/// newest value.
#[test]
fn a_follower_never_believes_what_is_being_reused() {
    // Three preemptions find every fault that was put in on purpose, and take seconds; all of them take minutes.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let area = Arc::new(LoomArea::new(1));
        let size = 64;
        let a = Arc::clone(&area);
        let owner = thread::spawn(move || {
            let mut book = Book::new(a.geometry(), size);
            append(&mut book, &a, 0, 0x11);
            let batch = book.batch(u64::MAX, book.head(), 0);
            assert!(book.sent(&batch, &[]));
            let mark = book.begin_flush(None::<&LoomArea>);
            assert!(book.flushed(&*a, &mark, false));
            append(&mut book, &a, 0, 0x22);
        });
        let mut book = Book::new(area.geometry(), size);
        let followed = book.follow(&*area, 2);
        assert_eq!(followed.damaged, 0);
        owner.join().unwrap();
        assert_eq!(book.adopt(&*area).damaged, 0);
        let mut value = [0; 8];
        assert_eq!(book.read(&*area, 0, &mut value), Ok(Gaps::Some(Vec::new())));
        assert_eq!(u64::from_le_bytes(value), 0x22);
    });
}
