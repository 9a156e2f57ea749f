//! Variables whose names are nearly those of options: each is named in a warning, since it has no effect.

use std::ffi::OsString;

use super::options::OPTIONS;

/// Warnings about variables that are none of the program's, but nearly.
pub fn misspelt(variables: impl Iterator<Item = OsString>) -> Vec<String> {
    /// A longer name may have as many wrong letters.
    const MAX_DISTANCE: usize = 2;
    /// In a shorter one, another letter makes another word, as in `APP_URL`.
    const MIN_LENGTH: usize = 8;
    /// A start of a name says as much. Shells set `_` in every program.
    const MIN_START: usize = 4;
    let known: Vec<_> = OPTIONS.iter().flat_map(|opt| opt.vars).copied().collect();
    let bare = |name: &str| name.replace(['_', '-'], "").to_ascii_uppercase().trim_end_matches('S').to_owned();
    // The number of wrong letters. The end of a name may be missing, as in SD_FILE: its last word, or a part of that.
    let distance = |name: &str, known: &str| {
        let is_long = name.len().min(known.len()) >= MIN_LENGTH;
        let (bare_name, bare_known) = (bare(name), bare(known));
        let is_start = name.contains('_') && bare_name.len() >= MIN_START && bare_known.starts_with(&bare_name);
        if bare_name == bare_known || is_start {
            return Some(0);
        }
        Some(strsim::damerau_levenshtein(name, known)).filter(|distance| is_long && *distance <= MAX_DISTANCE)
    };
    let names = variables.filter_map(|name| name.into_string().ok()).filter(|name| !known.contains(&&**name));
    let of_flag = |name: &str| OPTIONS.iter().find(|opt| opt.flag.replace('-', "_").to_ascii_uppercase() == name);
    let near = names.filter_map(|name| {
        let all = known.iter().filter_map(|known| Some((distance(&name, known)?, known)));
        let nearest = all.min_by_key(|(distance, _)| *distance).map(|(_, known)| known);
        let meant = of_flag(&name).and_then(|opt| opt.vars.first()).or(nearest)?;
        Some(format!("the variable {name} is none of baletheus: is {meant} meant?"))
    });
    near.collect()
}
