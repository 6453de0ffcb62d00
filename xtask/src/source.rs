//! Rust sources as the laws see them: without comments and strings, with test code told from product code.
//!
//! This is a lexer, not a parser: it knows comments, string and character literals, attributes and matching
//! brackets. That is enough to tell what is written from what is only talked about.

mod lexer;
mod tokens;

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::TaskError;
pub(crate) use tokens::{Token, tokens};

/// One source file. Offsets are the same in all its forms.
pub(crate) struct Source {
    /// Relative to the root of the repository.
    pub(crate) path: PathBuf,
    /// Comments, strings and characters blanked out.
    pub(crate) code: String,
    /// Comments blanked out, strings left.
    pub(crate) text: String,
    /// The parts that are compiled for tests only.
    tests: Vec<Range<usize>>,
}

impl Source {
    pub(crate) fn parse(path: impl Into<PathBuf>, raw: &str) -> Self {
        let lexer::Blanked { code, text } = lexer::blank(raw);
        let tests = tokens::test_regions(&code);
        let mut source = Self { path: path.into(), code, text, tests };
        if source.path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "benches") {
            source.mark_as_test();
        }
        source
    }

    /// The 1-based line of an offset.
    pub(crate) fn line(&self, offset: usize) -> usize {
        1 + self.code.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count()
    }

    /// The tokens that are compiled into the product.
    pub(crate) fn product_tokens(&self) -> Vec<Token<'_>> {
        tokens(&self.code).filter(|token| !self.is_test(token.offset)).collect()
    }

    /// Whether test code, its strings included, mentions `word`.
    pub(crate) fn test_mentions(&self, word: &str) -> bool {
        self.text.match_indices(word).any(|(offset, _)| self.is_test(offset))
    }

    fn is_test(&self, offset: usize) -> bool {
        self.tests.iter().any(|region| region.contains(&offset))
    }

    fn mark_as_test(&mut self) {
        self.tests = std::iter::once(0..self.code.len()).collect();
    }

    /// Where the modules live that are declared `#[cfg(test)] mod name;`: each as a file or a directory.
    fn out_of_line_tests(&self) -> Vec<PathBuf> {
        let parent = self.path.parent().unwrap_or(Path::new(""));
        let stem = self.path.file_stem().unwrap_or_default();
        let is_root = ["lib", "main", "mod"].iter().any(|root| stem == *root);
        let children = if is_root { parent.to_path_buf() } else { parent.join(stem) };
        let declared = self.tests.iter().flat_map(|region| tokens::declared_modules(&self.code, region));
        declared.flat_map(|name| [children.join(format!("{name}.rs")), children.join(name)]).collect()
    }
}

/// Reads every Rust source below `root`, generated and hidden directories aside.
///
/// # Errors
/// A directory or file cannot be read.
pub(crate) fn load(root: &Path) -> Result<Vec<Source>, TaskError> {
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.sort();
    let mut sources = Vec::new();
    for path in paths {
        let raw = std::fs::read_to_string(&path).map_err(TaskError::io(format!("read {}", path.display())))?;
        sources.push(Source::parse(path.strip_prefix(root).unwrap_or(&path), &raw));
    }
    mark_out_of_line_tests(&mut sources);
    Ok(sources)
}

/// Marks the files that belong to modules declared for tests only.
fn mark_out_of_line_tests(sources: &mut [Source]) {
    let places: Vec<PathBuf> = sources.iter().flat_map(Source::out_of_line_tests).collect();
    for source in sources {
        if places.iter().any(|place| source.path.starts_with(place)) {
            source.mark_as_test();
        }
    }
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) -> Result<(), TaskError> {
    // A build directory, by whatever name, bears this tag.
    if directory.join("CACHEDIR.TAG").exists() {
        return Ok(());
    }
    let list = || TaskError::io(format!("list {}", directory.display()));
    for entry in std::fs::read_dir(directory).map_err(list())? {
        let entry = entry.map_err(list())?;
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // Not through symbolic links: they may lead out of the repository or in a circle.
        let kind = entry.file_type().map_err(list())?;
        if kind.is_dir() && !hidden && entry.file_name() != "target" {
            collect(&path, paths)?;
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
