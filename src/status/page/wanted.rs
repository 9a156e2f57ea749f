//! What is asked of the page, and the links that ask for something else.

use html_escape::encode_double_quoted_attribute;
use hyper::Uri;
use reqwest::Url;

/// The most characters of a filter.
const MAX_FILTER_LENGTH: usize = 200;

/// What is asked of the page, in its query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Only devices with all of these words in what the page shows of them.
    pub filter: String,
    /// All rows, not only the first ones.
    pub all: bool,
    /// It does not load itself again.
    pub stays: bool,
}

impl Wanted {
    /// Reads the query of a request. What it does not know, it ignores.
    pub fn of(uri: &Uri) -> Self {
        let mut wanted = Wanted::default();
        let url =
            Url::parse("http://localhost/").and_then(|base| base.join(&format!("?{}", uri.query().unwrap_or(""))));
        let Ok(url) = url else { return wanted };
        for (name, value) in url.query_pairs() {
            match &*name {
                "q" => wanted.filter = value.trim().chars().take(MAX_FILTER_LENGTH).collect(),
                "rows" => wanted.all = value == "all",
                "refresh" => wanted.stays = value == "off",
                _ => {}
            }
        }
        wanted
    }

    /// The link to this, as an attribute's value.
    pub fn link(&self) -> String {
        let Ok(mut url) = Url::parse("http://localhost/") else { return "/".into() };
        if !self.filter.is_empty() {
            url.query_pairs_mut().append_pair("q", &self.filter);
        }
        for (name, value, is_set) in [("rows", "all", self.all), ("refresh", "off", self.stays)] {
            if is_set {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        let link = url.query().map_or("/".into(), |query| format!("/?{query}"));
        encode_double_quoted_attribute(&link).into_owned()
    }

    /// The words of the filter, in lower case.
    pub fn words(&self) -> Vec<String> {
        self.filter.to_lowercase().split_whitespace().map(str::to_owned).collect()
    }
}
