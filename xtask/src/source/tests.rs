//! What the lexer sees and does not see.

use super::*;

fn words(raw: &str) -> Vec<String> {
    let source = Source::parse("a.rs", raw);
    tokens(&source.code).filter(Token::is_word).map(|token| token.text.to_owned()).collect()
}

#[test]
fn comments_and_literals_are_not_code() {
    let raw = r##"
        // unsafe
        /* unsafe /* unsafe */ unsafe */ let a = "unsafe \" unsafe"; let b = r#"unsafe " unsafe"#;
        let c = '"'; let d = '\''; fn e<'unsafe_life>(f: &'unsafe_life str) {} let g = b"unsafe"; let h = 'ü';
    "##;
    assert_eq!(words(raw).join(" "), "let a let b let c let d fn e unsafe_life f unsafe_life str let g b let h");
}

#[test]
fn raw_names_and_names_that_end_in_r_are_code() {
    assert_eq!(words("r#type; for x in y {} wr \"a\"; br"), ["r", "type", "for", "x", "in", "y", "wr", "br"]);
}

#[test]
fn lines_stay() {
    let source = Source::parse("a.rs", "/* 1\n2 */\n\"\n4\" here");
    assert_eq!(source.line(source.code.find("here").unwrap()), 4);
}

#[test]
fn unfinished_literals_end_with_the_file() {
    for raw in ["/* x", "\"x", "r#\"x", "'\\", "'", "\"\\", "b'"] {
        assert!(words(raw).len() <= 1, "{raw}");
    }
}

fn product(raw: &str) -> String {
    Source::parse("a.rs", raw).product_tokens().iter().map(|token| token.text).collect::<Vec<_>>().join(" ")
}

#[test]
fn test_items_are_told_from_product_items() {
    assert_eq!(product("fn a() {} #[cfg(test)] mod tests { fn b() { { } } } fn c() {}"), "fn a ( ) { } fn c ( ) { }");
    assert_eq!(product("#[cfg(test)] use x; fn a() {}"), "fn a ( ) { }");
    assert_eq!(product("#[cfg(test)] #[derive(X)] fn b() -> [u8; 4] { } z"), "z");
    assert_eq!(product("#[cfg(all(test, loom))] mod b { } z"), "z");
    assert_eq!(product("#![cfg(test)] fn a() {}"), "");
    assert!(product("#[cfg(not(test))] fn a() {}").contains("fn a"));
    assert!(product("#[cfg(any(test, fuzzing))] fn a() {}").contains("fn a"));
    assert!(product("#[expect(x, reason = \"cfg(test)\")] fn a() {}").contains("fn a"));
}

#[test]
fn a_module_declared_for_tests_is_test_code_in_its_own_file() {
    let mut sources = [
        Source::parse("p/src/gate.rs", "#[cfg(test)] mod model; mod product;"),
        Source::parse("p/src/gate/model.rs", "fn a() {}"),
        Source::parse("p/src/gate/model/deeper.rs", "fn a() {}"),
        Source::parse("p/src/gate/product.rs", "fn a() {}"),
        Source::parse("p/tests/whole.rs", "fn a() {}"),
    ];
    mark_out_of_line_tests(&mut sources);
    let is_product: Vec<bool> = sources.iter().map(|source| !source.product_tokens().is_empty()).collect();
    assert_eq!(is_product, [true, false, false, true, false]);
}

#[test]
fn mentions_count_in_test_code_only() {
    let source =
        Source::parse("a.rs", "const A: &str = \"one\"; #[cfg(test)] mod t { /* two */ const B: &str = \"three\"; }");
    assert!(!source.test_mentions("one"));
    assert!(!source.test_mentions("two"));
    assert!(source.test_mentions("three"));
}

#[test]
fn build_and_hidden_directories_are_passed_over() {
    let root = tempfile::tempdir().unwrap();
    for (directory, file) in
        [("src", "a.rs"), ("target/x", "b.rs"), (".git", "c.rs"), ("built", "d.rs"), ("src", "e.txt")]
    {
        let directory = root.path().join(directory);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(file), "").unwrap();
    }
    std::fs::write(root.path().join("built/CACHEDIR.TAG"), "").unwrap();
    let paths: Vec<_> = load(root.path()).unwrap().into_iter().map(|source| source.path).collect();
    assert_eq!(paths, [PathBuf::from("src/a.rs")]);
}
