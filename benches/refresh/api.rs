//! A fleet of any size behind the simulated API, in a process of its own, so that what it costs is not counted. Each
//! answer is that of the strict simulation, made the first time that it is asked for and then kept.
//!
//! It is told by lines on standard input: `0` and `1` are the two states of the fleet, which differ in a device of each
//! hundred. Each line is answered by one: what was asked since the last one.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use std::{env, thread};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::cloud::{Cloud, Seen, read_request, recorded_devices};
use crate::support::fleet::sibling;

/// The server closes idle connections after that, as the real one does.
const IDLE: Duration = Duration::from_secs(5);

/// What was asked of the API, and what it sent, heads included.
#[derive(Default, Deserialize, Serialize)]
pub struct Traffic {
    /// The targets of the requests for devices.
    pub pages: Vec<String>,
    pub sent: usize,
    /// When the last answer was sent.
    pub last: Option<SystemTime>,
    /// Connections that are open now.
    pub open: usize,
}

/// The API as whoever measures sees it; it ends with its standard input.
pub struct Api {
    child: Child,
    tell: ChildStdin,
    told: BufReader<ChildStdout>,
    pub url: String,
}

impl Api {
    pub fn start(devices: u64) -> Self {
        let mut command = Command::new(env::current_exe().expect("the path of this program"));
        command.args(["api", &devices.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("this program runs");
        let (tell, told) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let mut api = Api { child, tell, told: BufReader::new(told), url: String::new() };
        api.url = api.read();
        api
    }

    /// Sets the state of the fleet, and tells what was asked since it was set last.
    pub fn set(&mut self, state: u8) -> Traffic {
        writeln!(self.tell, "{state}").expect("the API lives");
        serde_json::from_str(&self.read()).expect("JSON")
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.told.read_line(&mut line).expect("the API lives");
        line.trim_end().to_owned()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// State, target, and the headers that matter.
type Asked = (u8, String, Option<String>, Option<String>);

struct Server {
    devices: u64,
    patterns: Vec<Value>,
    cloud: Cloud,
    state: AtomicU8,
    traffic: Mutex<Traffic>,
    answers: Mutex<HashMap<Asked, Arc<Vec<u8>>>>,
}

/// The other side: serves until standard input ends.
pub fn serve(devices: u64) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    println!("http://{}", listener.local_addr().expect("an address"));
    let server = Arc::new(Server {
        devices,
        patterns: recorded_devices(),
        cloud: Cloud::start(Vec::new()),
        state: AtomicU8::new(0),
        traffic: Mutex::default(),
        answers: Mutex::default(),
    });
    let accepting = server.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let server = accepting.clone();
            thread::spawn(move || {
                server.traffic.lock().unwrap().open += 1;
                let _ = server.talk(stream); // an error is the end of a connection
                server.traffic.lock().unwrap().open -= 1;
            });
        }
    });
    for line in io::stdin().lines().map_while(Result::ok) {
        server.state.store(line.parse().expect("a state"), SeqCst);
        let mut traffic = server.traffic.lock().unwrap();
        println!("{}", serde_json::to_string(&*traffic).expect("JSON"));
        *traffic = Traffic { open: traffic.open, ..Traffic::default() };
    }
}

impl Server {
    fn talk(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        let mut unread = Vec::new();
        while let Some(seen) = read_request(&mut stream, &mut unread)? {
            let answer = self.answer(&seen);
            stream.write_all(&answer)?;
            let mut traffic = self.traffic.lock().unwrap();
            traffic.sent += answer.len();
            traffic.last = Some(SystemTime::now());
            if seen.target.starts_with("/v7/device") {
                traffic.pages.push(seen.target);
            }
        }
        Ok(())
    }

    fn answer(&self, seen: &Seen) -> Arc<Vec<u8>> {
        let (state, header) = (self.state.load(SeqCst), |name| seen.header(name).map(str::to_owned));
        let asked = (state, seen.target.clone(), header("accept-encoding"), header("if-none-match"));
        let mut answers = self.answers.lock().unwrap();
        let answer = answers.entry(asked).or_insert_with(|| {
            let number = |before| seen.target.split_once(before)?.1.split([')', '&']).next()?.parse().ok();
            let (after, top): (u64, u64) = (number("(id%20gt%20").unwrap_or(0), number("$top=").unwrap_or(0));
            let page = (after + 1..=self.devices.min(after + top)).map(|id| self.device(id, state)).collect();
            self.cloud.change(|devices| *devices = page);
            self.cloud.answer(seen).into()
        });
        answer.clone()
    }

    /// Like one of the recorded devices but for its identity. The names differ, and in each state that of one in a
    /// hundred is another one.
    fn device(&self, id: u64, state: u8) -> Value {
        let pattern = &self.patterns[usize::try_from(id).expect("an id") % self.patterns.len()];
        let name = pattern["device_name"].as_str().expect("a name");
        let mut device = sibling(pattern, id, &format!("{name} {id}"));
        if id % 100 == 50 && state == 1 {
            device["device_name"] = json!(format!("{name} {id} B"));
        }
        device
    }
}
