//! Loop devices: the file system that lies behind one.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// The device number of the file system that the file behind a loop device lies on: major and minor. `None` when nothing is behind it.
///
/// # Errors
/// The operating system's.
pub fn backing_device(device: BorrowedFd<'_>) -> io::Result<Option<(u32, u32)>> {
    // linux/loop.h
    const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
    // struct loop_info64 has 232 bytes; the first eight are lo_device.
    let mut info = [0u64; 29];
    // SAFETY: the ioctl writes a struct loop_info64, for which there is room, aligned to 8.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
    if result == 0 {
        return Ok(Some(decode(info[0])));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

/// A device number as the kernel gives it to programs (`huge_encode_dev` in linux/kdev_t.h): 12 bits of minor number above those of the
/// major number.
fn decode(device: u64) -> (u32, u32) {
    let low = u32::try_from(device & 0xffff_ffff).expect("32 bits");
    ((low >> 8) & 0xfff, (low & 0xff) | ((low >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_number_is_taken_apart() {
        assert_eq!(decode(0x27), (0, 0x27));
        assert_eq!(decode(0x0801), (8, 1));
        // Minor 0x123 of major 0: the fuse mounts of a busy machine.
        assert_eq!(decode(0x10_0023), (0, 0x123));
    }
}
