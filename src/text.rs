//! Text for people: escapes, plurals, the causes of an error.

use std::error::Error;
use std::iter;

/// Text that is safe on a terminal. A device chooses its own name: characters that would start a new line, move the cursor or
/// change the direction of writing become escapes.
pub fn printable(text: &str) -> String {
    escaped(text, |c| c.escape_default().to_string())
}

/// JSON that is safe on a terminal, and the same JSON: none of these characters is outside of a string.
pub fn printable_json(json: &str) -> String {
    let escape = |c: char| match *c.encode_utf16(&mut [0; 2]) {
        [unit] => format!("\\u{unit:04x}"),
        ref pair => format!("\\u{:04x}\\u{:04x}", pair[0], pair[1]),
    };
    escaped(json, escape)
}

fn escaped(text: &str, escape: impl Fn(char) -> String) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') || is_invisible(c) {
            shown.push_str(&escape(c));
        } else {
            shown.push(c);
        }
        shown
    })
}

/// Whether a character has no look of its own: of the direction of writing, of width zero, a tag. Blanks and combining marks have
/// one.
fn is_invisible(c: char) -> bool {
    // The standard library knows which characters are printable. It does not escape a combining mark behind a letter.
    !c.is_ascii() && !c.is_whitespace() && format!("a{c}").escape_debug().count() > 2
}

/// `1 device`, `2 devices`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// An error and its causes, the outermost first.
pub fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |error| (*error).source())
}
