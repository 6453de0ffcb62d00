//! Conversations as bytes. The numbers are those of proto.md and stand here once more, so that none can change unseen.

mod negotiation;
mod reply;
mod request;

/// The bytes that hexadecimal digits tell; blanks are for the reader.
fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.bytes().filter(|digit| !digit.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}
