//! Law: the keyword `unsafe` stands below sys/ only, unsafe attributes (`#[unsafe(no_mangle)]`) included. That every
//! block there has its SAFETY comment is clippy's to see.

use super::Verdict;
use crate::source::{Source, tokens};

const HOME: &str = "sys";

pub(super) fn look(sources: &[Source]) -> Verdict {
    let mut at_home = 0_usize;
    let mut violations = Vec::new();
    for source in sources {
        for token in tokens(&source.code).filter(|token| token.text == "unsafe") {
            if source.path.starts_with(HOME) {
                at_home += 1;
            } else {
                let line = source.line(token.offset);
                violations.push(format!(
                    "{}:{line}: unsafe: move it to {HOME}/ behind a safe function",
                    source.path.display()
                ));
            }
        }
    }
    Verdict { note: format!("{} files, {at_home} times below {HOME}/", sources.len()), violations }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(path: &str, raw: &str) -> Vec<String> {
        look(&[Source::parse(path, raw)]).violations
    }

    #[test]
    fn the_keyword_is_found_in_product_and_test_code() {
        let found = violations("core/store/src/dir.rs", "fn a() {\n    unsafe { b() }\n}");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("core/store/src/dir.rs:2: "), "{}", found[0]);
        assert_eq!(violations("tests/src/a.rs", "unsafe impl Send for A {} unsafe fn b() {}").len(), 2);
        assert_eq!(violations("core/a.rs", "#[unsafe(no_mangle)] fn a() {}").len(), 1);
        assert_eq!(violations("system/src/a.rs", "unsafe {}").len(), 1, "not sys/");
    }

    #[test]
    fn talk_of_it_is_not_found() {
        let raw = "#![forbid(unsafe_code)]\n//! unsafe\n/* unsafe */ const A: &str = \"unsafe\"; const B: &str = r#\"unsafe\"#;";
        assert!(violations("core/a.rs", raw).is_empty());
        assert!(violations("sys/src/memory.rs", "unsafe { map() }").is_empty());
    }
}
