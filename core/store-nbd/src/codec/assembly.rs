//! What the parts of one reply add up to. One per outstanding request.
//!
//! ```text
//! head ─▶ chunk: which body follows ─▶ data | hole | status | error: checked against the request
//!                                      the last one ─▶ finish: the answer, or what is missing
//! ```

use std::ops::Range;

use everdisk_proto::nbd::wire::{chunk, cmd};

use super::{
    coverage::{Coverage, Refused, SCATTERED_MAX},
    reply::{
        DATA_OFFSET_BYTES, ERROR_CHUNK_MAX, Extent, HOLE_BYTES, STATUS_CHUNK_MAX, ServerError, Violation, error, hole,
        status,
    },
};

/// The request whose reply is put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// [`cmd`]
    pub command: u16,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range.
    pub len: u32,
    /// Whether structured replies were agreed upon.
    pub structured: bool,
    /// The number of the context `base:allocation`, if it was agreed upon.
    pub context: Option<u32>,
}

/// The body that follows a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// None.
    Empty,
    /// All data of a READ, by a simple reply.
    AllData,
    /// An offset and data: [`Assembly::data`].
    Data {
        /// Bytes of the data.
        len: u32,
    },
    /// Few enough bytes to be read whole: [`Assembly::small`].
    Small,
}

/// How a request ended that the server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Done,
    /// The extents of a BLOCK_STATUS, from its offset on.
    Extents(Vec<Extent>),
    /// It failed.
    Failed(ServerError),
}

/// The parts of a reply that have come.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    asked: Asked,
    coverage: Coverage,
    extents: Option<Vec<Extent>>,
    /// The first one; what follows it often follows from it.
    error: Option<ServerError>,
}

impl Assembly {
    /// Nothing has come yet.
    pub fn new(asked: Asked) -> Self {
        Self { asked, coverage: Coverage::default(), extents: None, error: None }
    }

    /// A simple reply has come: whether data follow.
    ///
    /// # Errors
    /// The request needs a structured reply.
    pub fn simple(&mut self, number: u32) -> Result<Body, Violation> {
        // proto.md: with structured replies a simple one to a READ is wrong even as an error.
        let structured = self.asked.structured && self.asked.command == cmd::READ;
        if structured || (self.asked.command == cmd::BLOCK_STATUS && number == 0) {
            return Err(Violation::NeedsStructured);
        }
        if number != 0 {
            self.error = Some(ServerError { number, text: String::new(), offset: None });
            return Ok(Body::Empty);
        }
        if self.asked.command == cmd::READ {
            self.add(self.asked.offset, self.asked.len.into())?;
            return Ok(Body::AllData);
        }
        Ok(Body::Empty)
    }

    /// The head of a chunk has come: which body follows.
    ///
    /// # Errors
    /// The type does not belong to the request, or cannot have that length.
    pub fn chunk(&self, kind: u16, last: bool, len: u32) -> Result<Body, Violation> {
        if !self.asked.structured {
            return Err(Violation::NotAgreed);
        }
        let (wrong, foreign) = (Violation::ChunkLength { kind, len }, Violation::ForeignChunk { kind });
        let header = u32::try_from(DATA_OFFSET_BYTES).expect("8");
        match (kind, self.asked.command) {
            (chunk::NONE, _) if !last => Err(Violation::NoneNotLast),
            (chunk::NONE, _) => {
                if len == 0 {
                    Ok(Body::Empty)
                } else {
                    Err(wrong)
                }
            }
            (chunk::OFFSET_DATA, cmd::READ) => match len.checked_sub(header) {
                None | Some(0) => Err(wrong),
                Some(data) if data > self.asked.len => Err(wrong),
                Some(data) => Ok(Body::Data { len: data }),
            },
            (chunk::OFFSET_HOLE, cmd::READ) => {
                if usize::try_from(len) == Ok(HOLE_BYTES) {
                    Ok(Body::Small)
                } else {
                    Err(wrong)
                }
            }
            (chunk::BLOCK_STATUS, cmd::BLOCK_STATUS) => {
                if len <= STATUS_CHUNK_MAX {
                    Ok(Body::Small)
                } else {
                    Err(wrong)
                }
            }
            (error, _) if error >> 15 == 1 => {
                if len <= ERROR_CHUNK_MAX {
                    Ok(Body::Small)
                } else {
                    Err(wrong)
                }
            }
            _ => Err(foreign),
        }
    }

    /// A chunk OFFSET_DATA: where its bytes belong in the memory of the READ.
    ///
    /// # Errors
    /// Outside what was asked for, or a second time.
    pub fn data(&mut self, offset: u64, len: u32) -> Result<Range<usize>, Violation> {
        self.add(offset, len.into())
    }

    /// A body of the kind [`Body::Small`]. `Some`: these bytes of the READ are zeros.
    ///
    /// # Errors
    /// It is malformed, or does not belong to the request.
    pub fn small(&mut self, kind: u16, body: &[u8]) -> Result<Option<Range<usize>>, Violation> {
        match kind {
            chunk::OFFSET_HOLE => {
                let (offset, len) = hole(body)?;
                if len == 0 {
                    return Err(Violation::ChunkLength { kind, len });
                }
                return self.add(offset, len.into()).map(Some);
            }
            chunk::BLOCK_STATUS => {
                let wanted = self.asked.context.ok_or(Violation::NotAgreed)?;
                let extents = status(body, wanted, self.asked.len)?;
                if self.extents.replace(extents).is_some() {
                    return Err(Violation::SecondStatus);
                }
            }
            _ => {
                let said = error(kind, body)?;
                if let Some(offset) = said.offset {
                    let end = self.asked.offset + u64::from(self.asked.len);
                    if !(self.asked.offset..end).contains(&offset) {
                        return Err(self.out_of_range(offset, 1));
                    }
                }
                self.error.get_or_insert(said);
            }
        }
        Ok(None)
    }

    /// The last part has come.
    ///
    /// # Errors
    /// Without an error, something is missing.
    pub fn finish(&mut self) -> Result<Answer, Violation> {
        if let Some(error) = self.error.take() {
            return Ok(Answer::Failed(error));
        }
        match self.asked.command {
            cmd::READ => {
                let missing = u64::from(self.asked.len) - self.coverage.bytes();
                if missing == 0 { Ok(Answer::Done) } else { Err(Violation::Missing { asked: self.asked.len, missing }) }
            }
            cmd::BLOCK_STATUS => self.extents.take().map(Answer::Extents).ok_or(Violation::NoStatus),
            _ => Ok(Answer::Done),
        }
    }

    fn out_of_range(&self, offset: u64, len: u64) -> Violation {
        Violation::OutOfRange { offset, len, from: self.asked.offset, asked: self.asked.len }
    }

    fn add(&mut self, offset: u64, len: u64) -> Result<Range<usize>, Violation> {
        let out = || self.out_of_range(offset, len);
        let start = offset.checked_sub(self.asked.offset).ok_or_else(out)?;
        let end = start.checked_add(len).filter(|end| *end <= self.asked.len.into()).ok_or_else(out)?;
        self.coverage.add(start, end).map_err(|why| match why {
            Refused::Overlap => Violation::Overlap(offset),
            Refused::Scattered => Violation::Scattered(SCATTERED_MAX),
        })?;
        let index = |position: u64| usize::try_from(position).expect("within a request of at most 4 GiB");
        Ok(index(start)..index(end))
    }
}
