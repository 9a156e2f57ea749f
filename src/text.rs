//! Text for people: escapes, plurals, the causes of an error.

use std::error::Error;
use std::iter;

/// Text that is safe on a terminal. A device chooses its own name: characters that would start a new line, move the cursor or
/// change the direction of writing become escapes.
pub fn printable(text: &str) -> String {
    escaped(text, |c| c.escape_default().to_string())
}

/// JSON that is safe on a terminal, and the same JSON.
pub fn printable_json(json: &str) -> String {
    escaped(json, |c| format!("\\u{:04x}", u32::from(c))) // none of these characters has more digits, or is outside of a string
}

fn escaped(text: &str, escape: impl Fn(char) -> String) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        let changes_direction =
            matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || changes_direction {
            shown.push_str(&escape(c));
        } else {
            shown.push(c);
        }
        shown
    })
}

/// `1 device`, `2 devices`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// An error and its causes, the outermost first.
pub fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |error| (*error).source())
}
