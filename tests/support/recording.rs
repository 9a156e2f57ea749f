//! The recordings of a real open-balena-api: `NAME.req` is the curl command, `NAME.http` the answer as curl printed it.

use std::path::PathBuf;
use std::{fs, str};

/// One recorded exchange; two answers were recorded without their request.
pub struct Recording {
    pub request: Option<Request>,
    pub answer: Answer,
}

pub struct Request {
    pub method: String,
    /// Path and query, raw.
    pub target: String,
    pub headers: Vec<(String, String)>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

fn directory() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "recordings"].iter().collect()
}

/// The names of all recordings of a folder, sorted; `""` is the folder of all.
pub fn names(folder: &str) -> Vec<String> {
    let files = fs::read_dir(directory().join(folder)).expect("the directory of the recordings");
    let files = files.map(|file| file.expect("a recording").file_name());
    let name = |file: &str| Some(format!("{folder}{}", file.strip_suffix(".http")?));
    let mut names: Vec<_> = files.filter_map(|file| name(file.to_str()?)).collect();
    names.sort();
    names
}

impl Recording {
    /// `name` may name a folder too, as in `labels/NAME`.
    pub fn read(name: &str) -> Self {
        let answer = fs::read(directory().join(format!("{name}.http"))).expect("a recorded answer");
        let request = fs::read_to_string(directory().join(format!("{name}.req"))).ok();
        Self { request: request.as_deref().map(Request::parse), answer: Answer::parse(&answer) }
    }
}

impl Request {
    /// Splits the words of the curl command. The recorder did not escape apostrophes, so the URL is all that is left.
    fn parse(command: &str) -> Self {
        let (options, url) = command.trim_end().split_once("http://").expect("a URL");
        let url = match options.strip_suffix('\'') {
            Some(_) => url.strip_suffix('\'').expect("the end of the URL"),
            None => url,
        };
        let target = &url[url.find('/').expect("a path")..];
        let method = options.split_once("-X ").and_then(|(_, rest)| rest.split(' ').next());
        let header = |option: &str| {
            let (line, _) = option.split_once('\'')?;
            let (name, value) = line.split_once(": ")?;
            Some((name.to_owned(), value.to_owned()))
        };
        Self {
            method: method.unwrap_or("GET").to_owned(),
            target: target.to_owned(),
            headers: options.split("-H '").skip(1).filter_map(header).collect(),
        }
    }
}

impl Answer {
    /// Parses a whole answer, and undoes chunks.
    pub fn parse(raw: &[u8]) -> Self {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut head = httparse::Response::new(&mut headers);
        let length = head.parse(raw).expect("an HTTP answer");
        let length = match length {
            httparse::Status::Complete(length) => length,
            httparse::Status::Partial => {
                panic!("half an answer: {:?}", raw.escape_ascii().to_string())
            }
        };
        let text = |bytes| str::from_utf8(bytes).expect("UTF-8").to_owned();
        let mut answer = Self {
            status: text(raw.split(|byte| *byte == b'\r').next().unwrap_or_default()),
            headers: (head.headers.iter()).map(|header| (header.name.to_owned(), text(header.value))).collect(),
            body: raw[length..].to_vec(),
        };
        if answer.header("Transfer-Encoding") == Some("chunked") {
            answer.body = unchunk(&answer.body);
        }
        answer
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let same = |(other, _): &&(String, String)| other.eq_ignore_ascii_case(name);
        self.headers.iter().find(same).map(|(_, value)| value.as_str())
    }
}

/// Curl has undone the chunks of the recordings already; the chunked ones are all empty.
fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while !rest.is_empty() {
        let Ok(httparse::Status::Complete((start, size))) = httparse::parse_chunk_size(rest) else {
            panic!("a broken chunk");
        };
        let end = start + usize::try_from(size).expect("a size");
        body.extend_from_slice(&rest[start..end]);
        rest = &rest[end + 2..];
    }
    body
}
