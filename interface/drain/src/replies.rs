//! Replies in a stream whose position is unknown. Cookies are unpredictable numbers of 64 bits (`everdisk_proto::in_flight`), and a head
//! bears a magic number of 32 bits before one. So whatever resembles a head with an awaited cookie is one, also in the middle of
//! a read's data.

use std::collections::HashSet;

use everdisk_proto::nbd::wire::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};

/// Bytes of a head up to the end of its cookie: magic, then the error, or flags and kind, then the cookie (doc/proto.md of the NBD project,
/// "Simple reply message", "Structured reply chunk message").
const HEAD_BYTES: usize = 16;
/// NBD_REPLY_FLAG_DONE: the last chunk of a reply.
const DONE: u16 = 1;

/// Changes whose replies have not come yet.
#[derive(Debug)]
pub(crate) struct Awaited {
    cookies: HashSet<u64>,
    /// The last bytes that came, fewer than a head.
    tail: Vec<u8>,
    /// Bytes that may be the beginning of a head whose rest comes first from the socket. The inbox does not tell where it
    /// ends, so every place of it counts.
    openings: Vec<Vec<u8>>,
    /// The first bytes from the socket, fewer than a head.
    first: Vec<u8>,
}

impl Awaited {
    /// Those of these cookies whose reply does not lie in the inbox.
    pub(crate) fn new(cookies: impl IntoIterator<Item = u64>, inbox: &[u8]) -> Self {
        let mut awaited =
            Self { cookies: cookies.into_iter().collect(), tail: Vec::new(), openings: Vec::new(), first: Vec::new() };
        awaited.search(inbox);
        if awaited.left() > 0 {
            let first_bytes = [SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC].map(|magic| magic.to_be_bytes()[0]);
            let places = (0..inbox.len()).filter(|place| first_bytes.contains(&inbox[*place]));
            let opening = |place: usize| inbox[place..].iter().take(HEAD_BYTES - 1).copied().collect();
            awaited.openings = places.map(opening).collect();
        }
        awaited
    }

    pub(crate) fn left(&self) -> usize {
        self.cookies.len()
    }

    /// Crosses out what is answered by bytes that came from the socket.
    pub(crate) fn received(&mut self, bytes: &[u8]) {
        if self.first.len() < HEAD_BYTES - 1 {
            let missing = HEAD_BYTES - 1 - self.first.len();
            self.first.extend(bytes.iter().take(missing));
            self.join();
        }
        self.tail.extend_from_slice(bytes);
        let stream = std::mem::take(&mut self.tail);
        self.search(&stream);
        self.tail = stream[stream.len().saturating_sub(HEAD_BYTES - 1)..].to_vec();
    }

    /// A head may begin in the inbox and end in the socket.
    fn join(&mut self) {
        let (openings, first) = (std::mem::take(&mut self.openings), std::mem::take(&mut self.first));
        for opening in &openings {
            for begun in 1..=opening.len() {
                if let Some(rest) = first.get(..HEAD_BYTES - begun) {
                    self.search(&[&opening[..begun], rest].concat());
                }
            }
        }
        if first.len() < HEAD_BYTES - 1 {
            self.openings = openings;
        }
        self.first = first;
    }

    fn search(&mut self, bytes: &[u8]) {
        for head in bytes.windows(HEAD_BYTES) {
            if let Some(cookie) = answered(head.try_into().expect("windows of this length")) {
                self.cookies.remove(&cookie);
            }
        }
    }
}

/// The cookie of a head that ends a reply.
fn answered(head: &[u8; HEAD_BYTES]) -> Option<u64> {
    let [magic @ .., _, _, _, _, _, _, _, _, _, _, _, _] = *head;
    let [_, _, _, _, flags @ .., _, _, _, _, _, _, _, _, _, _] = *head;
    let [_, _, _, _, _, _, _, _, cookie @ ..] = *head;
    let is_last = match u32::from_be_bytes(magic) {
        SIMPLE_REPLY_MAGIC => true,
        STRUCTURED_REPLY_MAGIC => u16::from_be_bytes(flags) & DONE != 0,
        _ => false,
    };
    is_last.then(|| u64::from_be_bytes(cookie))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn simple(cookie: u64) -> Vec<u8> {
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
    }

    fn chunk(flags: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).unwrap().to_be_bytes();
        let head = [&STRUCTURED_REPLY_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &[0, 1], &cookie.to_be_bytes()];
        [&head.concat()[..], &len, body].concat()
    }

    #[test]
    fn g_only_the_last_chunk_of_a_reply_answers_it() {
        let mut awaited = Awaited::new([7, 9], &chunk(0, 7, b"error"));
        assert_eq!(awaited.left(), 2);
        awaited.received(&chunk(1, 7, b""));
        assert_eq!(awaited.left(), 1);
        awaited.received(&simple(8));
        assert_eq!(awaited.left(), 1, "nobody waits for that one");
        awaited.received(&simple(9));
        assert_eq!(awaited.left(), 0);
    }

    #[test]
    fn g_data_of_reads_may_hold_heads_of_others() {
        let mut awaited = Awaited::new([u64::MAX], &simple(3));
        awaited.received(&[simple(5), SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec(), simple(u64::MAX)].concat());
        assert_eq!(awaited.left(), 0);
    }

    proptest! {
        /// Wherever the dead core stopped reading, and whatever old bytes lie behind what it received: every reply is found, and
        /// no change is taken for answered that is not.
        #[test]
        fn g_every_reply_is_found_wherever_the_stream_is_cut(
            cookies in prop::collection::hash_set(1_u64.., 2..12),
            answers in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 12),
            cut in any::<prop::sample::Index>(),
            old in prop::collection::vec(any::<u8>(), 0..200),
            steps in prop::collection::vec(1_usize..50, 60),
        ) {
            let cookies: Vec<u64> = cookies.into_iter().collect();
            // The last one is not answered.
            let (missing, answered) = cookies.split_last().unwrap();
            let mut stream = Vec::new();
            for (cookie, (is_simple, data)) in answered.iter().zip(&answers) {
                stream.extend(if *is_simple { simple(*cookie) } else { chunk(1, *cookie, data) });
                stream.extend(chunk(1, !missing, data));
            }
            let cut = cut.index(stream.len());
            // Heads of earlier replies are old bytes too.
            let inbox = [&stream[..cut], &simple(!missing), &old].concat();
            let mut awaited = Awaited::new(cookies.iter().copied(), &inbox);
            let mut rest = &stream[cut..];
            for step in steps.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*step).min(rest.len()));
                awaited.received(now);
                rest = later;
            }
            prop_assert_eq!(awaited.left(), 1);
            awaited.received(&simple(*missing));
            prop_assert_eq!(awaited.left(), 0);
        }
    }
}
