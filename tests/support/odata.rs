//! The part of OData that baletheus may ask balenaCloud for: parsed as strictly as balena's own grammar
//! (`odata-parser.pegjs`) does, checked against a model, and evaluated over JSON rows.
//!
//! What surprises is the grammar's: a query is read raw, so a percent-encoded comma is no comma; `and` and `or` have the
//! same precedence; `not` takes only the next value; an order without a direction is descending.

use percent_encoding::percent_decode_str;
use serde_json::Value;
use std::cmp::Ordering;

/// Not a sentence of the grammar.
#[derive(Debug)]
pub struct Malformed;

/// A sentence of the grammar that the model or the reader's rights do not allow.
pub enum Refused {
    Unknown,
    Forbidden,
}

/// One resource of the model: its fields, separated by spaces, and its links to other resources.
pub struct Resource {
    pub fields: &'static str,
    pub links: &'static [(&'static str, &'static Resource)],
    /// Whether a device's own key and a guest may not read it.
    pub users_only: bool,
}

pub struct Request {
    pub resource: String,
    pub key: Option<(String, Value)>,
    pub count: bool,
    pub query: Query,
}

#[derive(Default)]
pub struct Query {
    /// `None` for all fields.
    select: Option<Vec<String>>,
    expand: Vec<(String, Query)>,
    filter: Option<Expr>,
    /// Each with whether it is descending.
    order: Vec<(Path, bool)>,
    pub top: Option<usize>,
    skip: usize,
}

type Path = Vec<String>;

enum Expr {
    Literal(Value),
    Path(Path),
    Any(Path, String, Box<Expr>),
    In(Box<Expr>, Vec<Value>),
    StartsWith(Box<Expr>, Box<Expr>),
    Not(Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
}

/// The operators and how strongly they bind.
const OPERATORS: [(&str, u8); 8] =
    [("eq", 2), ("ne", 2), ("gt", 2), ("ge", 2), ("lt", 2), ("le", 2), ("and", 1), ("or", 1)];

/// Parses what follows the version in a request's target: `/device?$select=id`.
pub fn parse(target: &str) -> Result<Request, Malformed> {
    let mut parser = Parser { rest: target };
    parser.expect("/")?;
    let resource = parser.name()?;
    let mut key = None;
    let mut count = false;
    if parser.eat("(") {
        key = Some(parser.key()?);
        parser.expect(")")?;
    } else {
        count = parser.eat("/$count");
    }
    let query = if parser.eat("?") && !parser.rest.is_empty() { parser.options(&["&"])? } else { Query::default() };
    if parser.rest.is_empty() { Ok(Request { resource, key, count, query }) } else { Err(Malformed) }
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn eat(&mut self, token: &str) -> bool {
        let after = self.rest.strip_prefix(token);
        self.rest = after.unwrap_or(self.rest);
        after.is_some()
    }

    fn eat_any(&mut self, tokens: &[&str]) -> bool {
        tokens.iter().any(|token| self.eat(token))
    }

    fn expect(&mut self, token: &str) -> Result<(), Malformed> {
        self.eat(token).then_some(()).ok_or(Malformed)
    }

    fn spaces(&mut self) -> bool {
        let before = self.rest.len();
        while self.eat_any(&["%20", "+", " "]) {}
        self.rest.len() < before
    }

    /// What may end a word: space, or a parenthesis to come.
    fn boundary(&mut self) -> bool {
        self.rest.starts_with('(') || self.spaces()
    }

    /// Eats a word and the boundary after it, or nothing.
    fn word(&mut self, word: &str) -> bool {
        let before = self.rest;
        let found = self.eat(word) && self.boundary();
        if !found {
            self.rest = before;
        }
        found
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Result<T, Malformed>) -> Result<Vec<T>, Malformed> {
        let mut items = vec![item(self)?];
        while self.eat(",") {
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn name(&mut self) -> Result<String, Malformed> {
        let end = self.rest.find(|c| ":/?#[]@!$*&()+,;= %".contains(c));
        let (name, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_owned()).ok_or(Malformed)
    }

    fn path(&mut self) -> Result<Path, Malformed> {
        let mut path = vec![self.name()?];
        while self.eat("/") {
            path.push(self.name()?);
        }
        Ok(path)
    }

    fn key(&mut self) -> Result<(String, Value), Malformed> {
        if let Some(id) = self.literal()? {
            return Ok(("id".to_owned(), id));
        }
        let name = self.name()?;
        self.expect("=")?;
        Ok((name, self.literal()?.ok_or(Malformed)?))
    }

    fn options(&mut self, separators: &[&str]) -> Result<Query, Malformed> {
        let mut query = Query::default();
        loop {
            if !self.eat_any(&["$", "%24"]) {
                return Err(Malformed);
            }
            let option = self.name()?;
            self.expect("=")?;
            match option.as_str() {
                "select" if self.eat("*") => query.select = None,
                "select" => query.select = Some(self.list(Self::name)?),
                "expand" => query.expand = self.list(Self::expand)?,
                "filter" => query.filter = Some(self.expression(0)?),
                "orderby" => query.order = self.list(Self::order)?,
                "top" => query.top = Some(self.unsigned()?),
                "skip" => query.skip = self.unsigned()?,
                _ => return Err(Malformed),
            }
            if !self.eat_any(separators) {
                return Ok(query);
            }
        }
    }

    fn expand(&mut self) -> Result<(String, Query), Malformed> {
        let name = self.name()?;
        if !self.eat("(") || self.eat(")") {
            return Ok((name, Query::default()));
        }
        let query = self.options(&[";", "&"])?;
        self.expect(")")?;
        Ok((name, query))
    }

    fn order(&mut self) -> Result<(Path, bool), Malformed> {
        let path = self.path()?;
        if !self.spaces() {
            return Ok((path, true));
        }
        let ascending = self.eat("asc");
        if !ascending {
            self.expect("desc")?;
        }
        Ok((path, !ascending))
    }

    fn digits(&mut self) -> &str {
        let end = self.rest.find(|c: char| !c.is_ascii_digit());
        let (digits, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        digits
    }

    fn unsigned(&mut self) -> Result<usize, Malformed> {
        self.digits().parse().map_err(|_| Malformed)
    }

    /// An expression whose operators all bind more strongly than `least`.
    fn expression(&mut self, least: u8) -> Result<Expr, Malformed> {
        let mut left = self.value()?;
        loop {
            let before = self.rest;
            let spaced = self.boundary();
            if spaced && self.word("in") {
                left = Expr::In(Box::new(left), self.literals()?);
                continue;
            }
            let found = OPERATORS.iter().find(|(word, _)| self.word(word));
            let Some((operator, strength)) = found.filter(|(_, strength)| *strength > least) else {
                self.rest = before;
                return Ok(left);
            };
            let right = self.expression(*strength)?;
            left = Expr::Binary(operator, Box::new(left), Box::new(right));
        }
    }

    fn value(&mut self) -> Result<Expr, Malformed> {
        if self.eat("(") {
            self.spaces();
            let inner = self.expression(0)?;
            self.spaces();
            self.expect(")")?;
            return Ok(inner);
        }
        if self.word("not") {
            return Ok(Expr::Not(Box::new(self.value()?)));
        }
        if let Some(literal) = self.literal()? {
            return Ok(Expr::Literal(literal));
        }
        let mut path = self.path()?;
        if path == ["startswith"] && self.eat("(") {
            let text = self.value()?;
            self.expect(",")?;
            let start = self.value()?;
            self.expect(")")?;
            return Ok(Expr::StartsWith(Box::new(text), Box::new(start)));
        }
        if path.len() > 1 && path.last().is_some_and(|last| last == "any") && self.eat("(") {
            path.pop();
            self.spaces();
            let variable = self.name()?;
            self.expect(":")?;
            let body = self.expression(0)?;
            self.spaces();
            self.expect(")")?;
            return Ok(Expr::Any(path, variable, Box::new(body)));
        }
        Ok(Expr::Path(path))
    }

    fn literals(&mut self) -> Result<Vec<Value>, Malformed> {
        self.expect("(")?;
        self.spaces();
        let literals = self.list(|parser| {
            parser.spaces();
            parser.literal()?.ok_or(Malformed)
        })?;
        self.spaces();
        self.expect(")")?;
        Ok(literals)
    }

    /// A literal, or `None` when a name comes instead.
    fn literal(&mut self) -> Result<Option<Value>, Malformed> {
        if self.apostrophe() {
            return self.text().map(|text| Some(Value::from(text)));
        }
        let before = self.rest;
        let negative = self.eat("-");
        if self.rest.starts_with(|c: char| c.is_ascii_digit()) {
            let number: i64 = self.digits().parse().map_err(|_| Malformed)?;
            return Ok(Some(Value::from(if negative { -number } else { number })));
        }
        let literal = match self.name().as_deref() {
            Ok("null") => Value::Null,
            Ok("true") => Value::from(true),
            Ok("false") => Value::from(false),
            _ => {
                self.rest = before;
                return Ok(None);
            }
        };
        Ok(Some(literal))
    }

    fn apostrophe(&mut self) -> bool {
        self.eat_any(&["'", "%27"])
    }

    /// The rest of a quoted literal, whose opening apostrophe has been eaten.
    fn text(&mut self) -> Result<String, Malformed> {
        let mut raw = String::new();
        loop {
            if self.apostrophe() {
                if !self.apostrophe() {
                    break;
                }
                raw.push('\'');
            } else {
                let mut rest = self.rest.chars();
                raw.push(rest.next().ok_or(Malformed)?);
                self.rest = rest.as_str();
            }
        }
        // The crate passes a stray percent sign through; JavaScript's decodeURIComponent throws.
        let encoded = |part: &str| part.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        if !raw.split('%').skip(1).all(encoded) {
            return Err(Malformed);
        }
        let text = percent_decode_str(&raw).decode_utf8();
        text.map(Into::into).map_err(|_| Malformed)
    }
}

/// The lambda variables in scope, each with its resource (when checking) or its row (when evaluating).
type Scope<'a, T> = Vec<(&'a str, &'a T)>;

/// Where a path begins: at a lambda's variable, or else at the root.
fn start<'a, 'p, T>(path: &'p [String], root: &'a T, scope: &Scope<'a, T>) -> (&'a T, &'p [String]) {
    match scope.iter().rev().find(|(name, _)| *name == path[0]) {
        Some((_, at)) => (at, &path[1..]),
        None => (root, path),
    }
}

impl Resource {
    fn linked(&self, name: &str) -> Option<&'static Self> {
        self.links.iter().find(|(link, _)| *link == name).map(|(_, resource)| *resource)
    }

    fn link(&self, name: &str, user: bool) -> Result<&'static Self, Refused> {
        match self.linked(name) {
            Some(resource) if resource.users_only && !user => Err(Refused::Forbidden),
            Some(resource) => Ok(resource),
            None => Err(Refused::Unknown),
        }
    }

    pub fn field(&self, name: &str) -> Result<(), Refused> {
        let known = self.fields.split_whitespace().any(|field| field == name);
        known.then_some(()).ok_or(Refused::Unknown)
    }
}

impl Query {
    /// Whether the model has all that is asked for, and `user` (or else a device or a guest) may read it.
    pub fn check(&self, resource: &Resource, user: bool) -> Result<(), Refused> {
        for (link, query) in &self.expand {
            query.check(resource.link(link, user)?, user)?;
        }
        for field in self.select.iter().flatten() {
            resource.field(field)?;
        }
        for (path, _) in &self.order {
            check_path(path, resource, &Scope::new(), user)?;
        }
        match &self.filter {
            Some(filter) => filter.check(resource, &mut Scope::new(), user),
            None => Ok(()),
        }
    }

    /// How many rows the filter lets through.
    pub fn count<'a>(&self, rows: impl Iterator<Item = &'a Value>) -> usize {
        rows.filter(|row| self.admits(row)).count()
    }

    /// Appends the rows that are asked for, as a JSON array with the keys in the API's order: links first.
    pub fn write<'a>(&self, resource: &Resource, rows: impl Iterator<Item = &'a Value>, json: &mut String) {
        let mut rows: Vec<_> = rows.filter(|row| self.admits(row)).collect();
        rows.sort_by(|a, b| self.compare(a, b));
        let rows = rows.into_iter().skip(self.skip);
        let rows = rows.take(self.top.unwrap_or(usize::MAX));
        write_list(json, ['[', ']'], rows, |row, json| self.write_row(resource, row, json));
    }

    fn write_row(&self, resource: &Resource, row: &Value, json: &mut String) {
        let mut parts: Vec<(&str, Option<&Self>)> = Vec::new();
        parts.extend(self.expand.iter().map(|(link, query)| (link.as_str(), Some(query))));
        match &self.select {
            Some(fields) => parts.extend(fields.iter().map(|field| (field.as_str(), None))),
            None => {
                let fields = resource.fields.split_whitespace().filter(|field| row.get(field).is_some());
                let plain = fields.filter(|field| self.expand.iter().all(|(link, _)| link != field));
                parts.extend(plain.map(|field| (field, None)));
            }
        }
        write_list(json, ['{', '}'], parts.into_iter(), |(name, query), json| {
            json.push_str(&format!("\"{name}\":"));
            let value = row.get(name).unwrap_or(&Value::Null);
            match (query.zip(resource.linked(name)), value) {
                (Some((query, linked)), _) => query.write(linked, value.as_array().into_iter().flatten(), json),
                (None, Value::Array(rows)) => match rows.first() {
                    Some(linked) => json.push_str(&format!("{{\"__id\":{}}}", linked["id"])),
                    None => json.push_str("null"),
                },
                (None, _) => json.push_str(&value.to_string()),
            }
        });
    }

    fn admits(&self, row: &Value) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.holds(row, &mut Scope::new()))
    }

    fn compare(&self, a: &Value, b: &Value) -> Ordering {
        let one = |(path, descending): &(Path, bool)| {
            let [a, b] = [a, b].map(|row| find(path, row, &Scope::new()));
            let order = compare(a, b).unwrap_or(Ordering::Equal);
            if *descending { order.reverse() } else { order }
        };
        self.order.iter().map(one).fold(Ordering::Equal, Ordering::then)
    }
}

fn write_list<T>(
    json: &mut String, [open, close]: [char; 2], items: impl Iterator<Item = T>, mut write: impl FnMut(T, &mut String),
) {
    json.push(open);
    for (index, item) in items.enumerate() {
        if index > 0 {
            json.push(',');
        }
        write(item, json);
    }
    json.push(close);
}

fn check_path<'a>(path: &[String], root: &'a Resource, scope: &Scope<'a, Resource>, user: bool) -> Result<(), Refused> {
    let (at, rest) = start(path, root, scope);
    let (field, links) = rest.split_last().ok_or(Refused::Unknown)?;
    links.iter().try_fold(at, |at, link| at.link(link, user))?.field(field)
}

impl Expr {
    fn check<'a>(&'a self, root: &'a Resource, scope: &mut Scope<'a, Resource>, user: bool) -> Result<(), Refused> {
        match self {
            Self::Literal(_) => Ok(()),
            Self::Path(path) => check_path(path, root, scope, user),
            Self::Any(path, variable, body) => {
                let (at, links) = start(path, root, scope);
                scope.push((variable, links.iter().try_fold(at, |at, link| at.link(link, user))?));
                body.check(root, scope, user)?;
                scope.pop();
                Ok(())
            }
            Self::In(inner, _) | Self::Not(inner) => inner.check(root, scope, user),
            Self::Binary(_, left, right) | Self::StartsWith(left, right) => {
                left.check(root, scope, user)?;
                right.check(root, scope, user)
            }
        }
    }

    fn holds<'a>(&'a self, root: &'a Value, scope: &mut Scope<'a, Value>) -> bool {
        match self {
            Self::Literal(_) | Self::Path(_) => *self.value(root, scope) == Value::Bool(true),
            Self::Any(path, variable, body) => {
                let (at, links) = start(path, root, scope);
                let mut rows = vec![at];
                for link in links {
                    let linked = |row: &'a Value| row.get(link).and_then(Value::as_array).into_iter().flatten();
                    rows = rows.into_iter().flat_map(linked).collect();
                }
                rows.into_iter().any(|row| {
                    scope.push((variable, row));
                    let holds = body.holds(root, scope);
                    scope.pop();
                    holds
                })
            }
            Self::In(inner, values) => {
                let value = inner.value(root, scope);
                values.iter().any(|one| compare(value, one) == Some(Ordering::Equal))
            }
            Self::Not(inner) => !inner.holds(root, scope),
            Self::StartsWith(text, start) => {
                let [text, start] = [text, start].map(|part| part.value(root, scope).as_str().map(str::to_owned));
                text.zip(start).is_some_and(|(text, start)| text.starts_with(&start))
            }
            Self::Binary("and", left, right) => left.holds(root, scope) && right.holds(root, scope),
            Self::Binary("or", left, right) => left.holds(root, scope) || right.holds(root, scope),
            Self::Binary(operator, left, right) => {
                let order = compare(left.value(root, scope), right.value(root, scope));
                match *operator {
                    "eq" => order == Some(Ordering::Equal),
                    "ne" => order != Some(Ordering::Equal),
                    "gt" => order == Some(Ordering::Greater),
                    "ge" => order.is_some_and(Ordering::is_ge),
                    "lt" => order == Some(Ordering::Less),
                    "le" => order.is_some_and(Ordering::is_le),
                    _ => unreachable!("one of OPERATORS"),
                }
            }
        }
    }

    fn value<'a>(&'a self, root: &'a Value, scope: &mut Scope<'a, Value>) -> &'a Value {
        match self {
            Self::Literal(value) => value,
            Self::Path(path) => find(path, root, scope),
            _ if self.holds(root, scope) => &Value::Bool(true),
            _ => &Value::Bool(false),
        }
    }
}

/// What a path leads to; a link stands for the id of its row, as the reference in the database does.
fn find<'a>(path: &[String], root: &'a Value, scope: &Scope<'a, Value>) -> &'a Value {
    let (mut at, names) = start(path, root, scope);
    for name in names {
        at = match at.get(name) {
            Some(Value::Array(rows)) => rows.first().unwrap_or(&Value::Null),
            Some(value) => value,
            None => &Value::Null,
        };
    }
    match at {
        Value::Object(row) => row.get("id").unwrap_or(&Value::Null),
        _ => at,
    }
}

/// `None` for values of different types, which are neither equal nor in order.
fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Null, Value::Null) => Some(Ordering::Equal),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (Value::Number(a), Value::Number(b)) => a.as_f64()?.partial_cmp(&b.as_f64()?),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => None,
    }
}
