//! A disk that is obviously right: a vector of bytes. Whatever executes I/O is compared with it.

/// The bytes that a disk of this size must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceDisk {
    bytes: Vec<u8>,
}

impl ReferenceDisk {
    /// A disk of `size` bytes, never written.
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0; size] }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// The `len` bytes from `offset` on; `None` when they are not inside the disk.
    pub fn read(&self, offset: usize, len: usize) -> Option<&[u8]> {
        self.bytes.get(offset..offset.checked_add(len)?)
    }

    /// Writes `data` at `offset`; false, and nothing happens, when it is not inside the disk.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        self.range(offset, data.len()).map(|range| range.copy_from_slice(data)).is_some()
    }

    /// Makes a range zero, as a discard or a zeroing does; false, and nothing happens, when it is not inside the disk.
    pub fn zero(&mut self, offset: usize, len: usize) -> bool {
        self.range(offset, len).map(|range| range.fill(0)).is_some()
    }

    /// Grows the disk to `size` bytes; the new ones are zero.
    pub fn grow(&mut self, size: usize) {
        self.bytes.resize(size.max(self.bytes.len()), 0);
    }

    /// Whether a range holds nothing but zeros, so that it may be a hole; false when it is not inside the disk.
    pub fn is_zero(&self, offset: usize, len: usize) -> bool {
        self.read(offset, len).is_some_and(|bytes| bytes.iter().all(|b| *b == 0))
    }

    fn range(&mut self, offset: usize, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(offset..offset.checked_add(len)?)
    }
}
