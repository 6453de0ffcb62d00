//! Loom: a core that appends, sends and reuses slots and ring, beside a standby that follows.

use loom::{sync::Arc, thread};

use super::*;
use crate::testing::LoomArea;

fn append(book: &mut Book, area: &LoomArea, offset: u64, value: u64) {
    let place = book.reserve(area, ExtentKind::Data, &(offset..offset + 8)).unwrap();
    let data = value.to_le_bytes();
    let (kind, crc) = (ExtentKind::Data, crc32c::crc32c(&data));
    let extent = Extent { kind, offset, len: 8, position: place.position, generation: 1, crc };
    log::publish(area, place.seq, &extent, &data);
    book.published(area, place.seq, &extent);
}

/// D3, D4: under any interleaving a follower accepts only an extent that was complete and in place while it was read:
/// never a half-written one, and never one whose memory was reused. It reports no damage where there is none. When it
/// adopts the buffer afterwards, it has the newest value.
#[test]
fn a_follower_never_believes_what_is_being_reused() {
    // Three preemptions find every bug that was injected, and take seconds. Exploring all of them takes minutes.
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
