//! Blanks out comments and literals, byte for byte, so that offsets and lines stay what they were.

/// Two forms of one source, of the same length.
pub(super) struct Blanked {
    /// Without comments, strings and characters.
    pub(super) code: String,
    /// Without comments only.
    pub(super) text: String,
}

/// What starts at a place.
enum Piece {
    Comment,
    Literal,
    Code,
}

pub(super) fn blank(raw: &str) -> Blanked {
    let mut code = raw.as_bytes().to_vec();
    let mut text = code.clone();
    let mut at = 0;
    while at < raw.len() {
        let (piece, length) = piece_at(raw, at);
        let end = (at + length.max(1)).min(raw.len());
        match piece {
            Piece::Comment => {
                erase(&mut code[at..end]);
                erase(&mut text[at..end]);
            }
            Piece::Literal => erase(&mut code[at..end]),
            Piece::Code => {}
        }
        at = end;
    }
    // Whole characters were replaced, so both are still UTF-8.
    let string = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Blanked { code: string(code), text: string(text) }
}

fn erase(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().filter(|byte| **byte != b'\n') {
        *byte = b' ';
    }
}

/// The piece that begins at `at`, and its length in bytes.
fn piece_at(raw: &str, at: usize) -> (Piece, usize) {
    let rest = raw.get(at..).unwrap_or("");
    if rest.starts_with("//") {
        return (Piece::Comment, rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return (Piece::Comment, block_comment(rest));
    }
    if rest.starts_with('"') {
        return (Piece::Literal, quoted(rest, b'"'));
    }
    if rest.starts_with('\'') {
        return character(rest).map_or((Piece::Code, 1), |length| (Piece::Literal, length));
    }
    // A word is taken whole, so that the `r` of a raw string is not the end of a name.
    let word = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
    if let ("r" | "br" | "cr", after) = rest.split_at(word)
        && let Some(length) = raw_string(after)
    {
        return (Piece::Literal, word + length);
    }
    let first = rest.chars().next().map_or(1, char::len_utf8);
    (Piece::Code, word.max(first))
}

pub(super) fn is_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

/// Block comments nest.
fn block_comment(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let (mut depth, mut at) = (0_usize, 0);
    while at < bytes.len() {
        match bytes.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// A literal between quotes, with backslash escapes.
fn quoted(rest: &str, quote: u8) -> usize {
    let mut bytes = rest.bytes().enumerate().skip(1);
    while let Some((at, byte)) = bytes.next() {
        if byte == b'\\' {
            bytes.next();
        } else if byte == quote {
            return at + 1;
        }
    }
    rest.len()
}

/// `#"…"#` after an `r`; `None` if it is none (a raw name, say).
fn raw_string(after: &str) -> Option<usize> {
    let hashes = after.bytes().take_while(|&byte| byte == b'#').count();
    let body = after.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&end).map_or(after.len(), |at| hashes + 1 + at + end.len()))
}

/// A character literal; `None` if it is a lifetime.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    if chars.next()?.1 == '\\' {
        return Some(quoted(rest, b'\''));
    }
    let (at, close) = chars.next()?;
    (close == '\'').then_some(at + 1)
}
