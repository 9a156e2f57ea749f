//! Simulated devices that answer as one real node_exporter did, with figures that move: counters grow, and most gauges vary.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;

/// What a counter of the page has counted since the boot, in seconds: 11 days.
const UPTIME: f64 = 1e6;
/// Gauges that stay the same.
const CONSTANT: [&str; 13] = [
    "Total",
    "size_bytes",
    "_files{",
    "_info",
    "_max",
    "_min",
    "Limit",
    "VmallocUsed",
    "Hugepagesize",
    "boot_time",
    "success",
    "governor",
    "timex",
];

/// A page of an exporter, line by line.
pub struct Page(Vec<Line>);

enum Line {
    Comment(String),
    Sample { series: String, value: f64, moves: Moves },
}

#[derive(Clone, Copy, PartialEq)]
enum Moves {
    Never,
    /// A counter, in such steps.
    Up(f64),
    /// A gauge, in such steps; 0 is any.
    Around(f64),
    WithTime,
}

impl Page {
    pub fn parse(text: &str) -> Self {
        let mut kind = "";
        let lines = text.lines().map(|line| {
            if let Some(comment) = line.strip_prefix("# TYPE ") {
                kind = comment.rsplit(' ').next().expect("a type");
            }
            match line.rsplit_once(' ') {
                Some((series, value)) if !line.starts_with('#') => {
                    let value: f64 = value.parse().expect("a number");
                    Line::Sample { series: series.to_owned(), value, moves: moves(series, kind, value) }
                }
                _ => Line::Comment(line.to_owned()),
            }
        });
        Self(lines.collect())
    }

    pub fn samples(&self) -> usize {
        self.0.iter().filter(|line| matches!(line, Line::Sample { .. })).count()
    }
}

fn moves(series: &str, kind: &str, value: f64) -> Moves {
    let has = |part: &str| series.contains(part);
    match kind {
        _ if has("node_time_seconds") => Moves::WithTime,
        _ if value == 0.0 || (kind == "gauge" && CONSTANT.iter().any(|part| has(part))) => Moves::Never,
        "counter" | "untyped" => Moves::Up(if has("seconds") { 0.001 } else { 1.0 }),
        _ if has("duration_seconds") => Moves::Around(0.0),
        _ if has("bytes") => Moves::Around(4096.0),
        _ if has("temp") => Moves::Around(0.487),
        _ if has("load") => Moves::Around(0.01),
        _ => Moves::Around(1.0),
    }
}

/// The figures of one device.
struct Figures {
    values: Vec<f64>,
    at: Instant,
}

pub struct Devices {
    page: Page,
    figures: Mutex<HashMap<String, Figures>>,
}

impl Devices {
    /// One server for all of them: a request names its device as its host.
    pub fn serve(page: Page) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("its address");
        let devices = Arc::new(Devices { page, figures: Mutex::default() });
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let devices = devices.clone();
                thread::spawn(move || devices.answer(stream)); // an error is the end of a connection
            }
        });
        addr
    }

    fn answer(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut requests = BufReader::new(stream.try_clone()?);
        loop {
            let (mut host, mut takes_gzip, mut line) = (String::new(), false, String::new());
            loop {
                line.clear();
                if requests.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let line = line.trim_end().to_ascii_lowercase();
                if line.is_empty() {
                    break;
                }
                if let Some(name) = line.strip_prefix("host: ") {
                    name.clone_into(&mut host);
                }
                takes_gzip |= line.starts_with("accept-encoding:") && line.contains("gzip");
            }
            let mut body = self.page(&host).into_bytes();
            let mut coding = "";
            if takes_gzip {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&body)?;
                (body, coding) = (encoder.finish()?, "Content-Encoding: gzip\r\n");
            }
            let length = body.len();
            let kind = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores";
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{coding}Content-Length: {length}\r\n\r\n")?;
            stream.write_all(&body)?;
        }
    }

    fn page(&self, device: &str) -> String {
        let mut all = self.figures.lock().expect("no thread has panicked");
        let figures = all.entry(device.to_owned()).or_insert_with(|| {
            let values = self.page.0.iter().filter_map(|line| match line {
                Line::Sample { value, .. } => Some(*value),
                Line::Comment(_) => None,
            });
            Figures { values: values.collect(), at: Instant::now() }
        });
        let elapsed = figures.at.elapsed().as_secs_f64();
        figures.at = Instant::now();
        let (mut text, mut values) = (String::new(), figures.values.iter_mut());
        for line in &self.page.0 {
            match line {
                Line::Comment(comment) => text.push_str(comment),
                Line::Sample { series, value: first, moves } => {
                    let value = values.next().expect("one a sample");
                    match *moves {
                        Moves::Never => {}
                        Moves::WithTime => *value = now(),
                        Moves::Up(_) => *value += first / UPTIME * elapsed * (0.5 + fastrand::f64()),
                        Moves::Around(_) => *value = first * (0.98 + 0.04 * fastrand::f64()),
                    }
                    let shown = match *moves {
                        Moves::Up(step) | Moves::Around(step) if step > 0.0 => (*value / step).floor() * step,
                        _ => *value,
                    };
                    text += &format!("{series} {}", (shown * 1e9).round() / 1e9);
                }
            }
            text.push('\n');
        }
        text
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs_f64()
}
