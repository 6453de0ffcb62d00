//! Words and signs of blanked code, and the regions that `#[cfg(test)]` governs.

use std::ops::Range;

use super::lexer::is_word;

/// A word (name, keyword, number) or a single sign; `::` is one sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) text: &'a str,
    pub(crate) offset: usize,
}

impl Token<'_> {
    pub(crate) fn is_word(&self) -> bool {
        self.text.starts_with(is_word)
    }

    fn end(&self) -> usize {
        self.offset + self.text.len()
    }
}

/// The tokens of code in which comments and literals are blanked out.
pub(crate) fn tokens(code: &str) -> impl Iterator<Item = Token<'_>> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = code.get(offset..)?.trim_start();
        let first = rest.chars().next()?;
        let length = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let start = code.len() - rest.len();
        offset = start + length;
        Some(Token { text: rest.get(..length)?, offset: start })
    })
}

/// The parts of the code that are compiled for tests only: the items under `#[cfg(test)]` and the like, or all of it
/// under `#![cfg(test)]`.
pub(super) fn test_regions(code: &str) -> Vec<Range<usize>> {
    let tokens: Vec<Token> = tokens(code).collect();
    let mut regions = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let Some(attribute) = attribute(&tokens, at) else {
            at += 1;
            continue;
        };
        if !is_for_tests(&tokens[attribute.clone()]) {
            at = attribute.end;
        } else if tokens[at + 1].text == "!" {
            return std::iter::once(0..code.len()).collect();
        } else {
            let end = item_end(&tokens, attribute.end);
            regions.push(tokens[at].offset..tokens.get(end - 1).map_or(code.len(), Token::end));
            at = end;
        }
    }
    regions
}

/// The modules that are declared in `region` without a body.
pub(super) fn declared_modules<'a>(code: &'a str, region: &Range<usize>) -> Vec<&'a str> {
    let tokens: Vec<Token> = tokens(code.get(region.clone()).unwrap_or("")).collect();
    let declared = tokens.windows(3).filter(|three| three[0].text == "mod" && three[2].text == ";");
    declared.map(|three| three[1].text).collect()
}

/// The attribute that begins at token `at`, from its `#` to behind its `]`.
fn attribute(tokens: &[Token], at: usize) -> Option<Range<usize>> {
    let sign = |index: usize| tokens.get(index).map(|token| token.text);
    if sign(at)? != "#" {
        return None;
    }
    let open = if sign(at + 1)? == "!" { at + 2 } else { at + 1 };
    (sign(open)? == "[").then(|| at..closed(tokens, open))
}

/// Behind the bracket that matches the one at `open`.
fn closed(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token.text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return index + 1;
        }
    }
    tokens.len()
}

/// `cfg(test)`, `cfg(all(test, …))`; not `cfg(not(test))`, nor `cfg(any(test, …))`, which is product code as well.
fn is_for_tests(attribute: &[Token]) -> bool {
    let mut words = attribute.iter().filter(|token| token.is_word()).map(|token| token.text);
    words.next() == Some("cfg") && {
        let conditions: Vec<&str> = words.collect();
        conditions.contains(&"test") && !conditions.iter().any(|word| matches!(*word, "not" | "any"))
    }
}

/// Behind the item that begins at token `at`: its `;`, or the end of its braces.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    while let Some(token) = tokens.get(at) {
        match token.text {
            ";" => return at + 1,
            "{" => return closed(tokens, at),
            "(" | "[" => at = closed(tokens, at),
            _ => at += 1,
        }
    }
    tokens.len()
}
