//! Writing to the terminal. A reader that has gone (`everdisk status | head`) ends the program quietly.

use std::io::{self, Write};

use serde_json::Value;

/// Writes a line of result.
pub(crate) fn line(text: &str) {
    let mut out = io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Writes an object as one line of JSON.
pub(crate) fn json(value: &Value) {
    line(&value.to_string());
}

/// Writes a line about the work.
pub(crate) fn complain(text: &str) {
    // Nothing depends on it: who reads it may be gone.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes columns, each as wide as its widest cell.
pub(crate) fn table(rows: &[Vec<String>]) {
    let mut widths = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}
