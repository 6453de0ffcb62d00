//! The write buffer of the volumes under test. `EVERDISK_TEST_BUFFER` gives all of them another size: with `0` the same
//! tests show what holds of a synchronous volume.

/// The size for `--buffer`: as wanted, unless EVERDISK_TEST_BUFFER says another one.
pub fn size(wanted: &str) -> String {
    std::env::var("EVERDISK_TEST_BUFFER").unwrap_or_else(|_| wanted.to_owned())
}

/// Whether writes are buffered at all.
pub fn is_on() -> bool {
    size("wanted") != "0"
}
