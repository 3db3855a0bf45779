//! The Jinja environment that transformers gives to a chat template, in minijinja.

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
#[cfg(test)]
use minijinja::value::Serde;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::generation;
use super::python::{self, JsonStyle};

/// The name under which the template is stored; without an extension, so that nothing is escaped.
pub(super) const NAME: &str = "chat_template";

/// Compiles a template as `_compile_jinja_template` of transformers does.
pub(super) fn compile(source: String, now: DateTime) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_formatter(|out, _state, value| {
        if value.is_undefined() {
            return Ok(());
        }
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&python::to_str(value)?),
        }
        .map_err(Error::from)
    });
    env.set_unknown_method_callback(method);

    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", move |format: &str| {
        jiff::fmt::strtime::format(format, now)
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
    });
    env.add_function("cycler", minijinja_contrib::globals::cycler);
    env.add_function("joiner", minijinja_contrib::globals::joiner);

    env.add_filter("tojson", tojson);
    env.add_filter("trim", trim);
    env.add_filter("string", |value: Value| python::to_str(&value));
    env.add_filter(generation::FILTER, |body: &str| format!("{}{body}{}", generation::OPEN, generation::CLOSE));

    // Jinja asks whether the value has a length and items, which strings and dicts have as well.
    env.add_test("sequence", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |value: Value| value.try_iter().is_ok() || value.as_str().is_some());
    env.add_test("number", |value: Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));

    env.add_template_owned(NAME, source)?;
    Ok(env)
}

fn raise_exception(message: Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, python::to_str(&message)?))
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    value: Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let argument = |positional: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(ensure_ascii, "ensure_ascii")?;
    let indent = argument(indent, "indent")?;
    let separators = argument(separators, "separators")?;
    let sort_keys = argument(None, "sort_keys")?;
    kwargs.assert_all_used()?;

    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => Some(" ".repeat(i64::try_from(width)?.max(0) as usize)),
    };
    let (item_separator, key_separator) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => (python::to_str(&pair.get_item_by_index(0)?)?, python::to_str(&pair.get_item_by_index(1)?)?),
    };
    let truth = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let style = JsonStyle {
        ensure_ascii: truth(ensure_ascii),
        indent,
        item_separator,
        key_separator,
        sort_keys: truth(sort_keys),
    };
    python::json_dumps(&value, &style)
}

/// Jinja's `trim`: `str(value).strip(chars)`.
fn trim(value: Value, chars: Option<&str>) -> Result<String, Error> {
    let text = python::to_str(&value)?;
    Ok(strip(&text, chars, Side::Both).to_owned())
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
    Both,
}

fn strip<'t>(text: &'t str, chars: Option<&str>, side: Side) -> &'t str {
    let matches = |c: char| chars.map_or_else(|| python::is_space(c), |chars| chars.contains(c));
    match side {
        Side::Left => text.trim_start_matches(matches),
        Side::Right => text.trim_end_matches(matches),
        Side::Both => text.trim_matches(matches),
    }
}

/// The methods of Python's types. Those of `str` that minijinja-contrib lacks, or gives Rust's idea of whitespace,
/// are here; the rest is `pycompat`.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, args)
    {
        return result;
    }
    if name == "copy" && matches!(value.kind(), ValueKind::Map | ValueKind::Seq) {
        let () = from_args(args)?;
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match name {
        "strip" => strip_method(text, args, Side::Both),
        "lstrip" => strip_method(text, args, Side::Left),
        "rstrip" => strip_method(text, args, Side::Right),
        "removeprefix" => {
            from_args::<(&str,)>(args).map(|(prefix,)| Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            from_args::<(&str,)>(args).map(|(suffix,)| Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "split" => split(text, args, false),
        "rsplit" => split(text, args, true),
        "partition" => from_args::<(&str,)>(args).map(|(sep,)| match text.split_once(sep) {
            Some((before, after)) => strings([before, sep, after]),
            None => strings([text, "", ""]),
        }),
        "rpartition" => from_args::<(&str,)>(args).map(|(sep,)| match text.rsplit_once(sep) {
            Some((before, after)) => strings([before, sep, after]),
            None => strings(["", "", text]),
        }),
        "isspace" => {
            from_args::<()>(args).map(|()| Value::from(!text.is_empty() && text.chars().all(python::is_space)))
        }
        "casefold" => from_args::<()>(args).map(|()| Value::from(text.to_lowercase())),
        _ => return None,
    })
}

fn strip_method(text: &str, args: &[Value], side: Side) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    Ok(Value::from(strip(text, chars, side)))
}

/// `str.split(sep=None, maxsplit=-1)` and, from the right, `str.rsplit`.
fn split(text: &str, args: &[Value], right: bool) -> Result<Value, Error> {
    let (sep, maxsplit, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let sep = match sep {
        Some(sep) => Some(sep),
        None => kwargs.get::<Option<Value>>("sep")?,
    };
    let maxsplit = match maxsplit {
        Some(limit) => limit,
        None => kwargs.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
    };
    kwargs.assert_all_used()?;
    let limit = usize::try_from(maxsplit).map_or(usize::MAX, |limit| limit.saturating_add(1));
    let sep = sep.filter(|sep| !sep.is_none());
    let parts: Vec<&str> = match sep.as_ref() {
        None => split_whitespace(text, limit, right),
        Some(sep) => {
            let sep = sep.as_str().filter(|sep| !sep.is_empty()).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, "split: the separator must be a non-empty string")
            })?;
            if right {
                let mut parts: Vec<&str> = text.rsplitn(limit, sep).collect();
                parts.reverse();
                parts
            } else {
                text.splitn(limit, sep).collect()
            }
        }
    };
    Ok(strings(parts))
}

fn strings<'t>(parts: impl IntoIterator<Item = &'t str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn split_whitespace(text: &str, limit: usize, right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_matches(python::is_space);
    while !rest.is_empty() {
        let cut = if right { rest.rfind(python::is_space) } else { rest.find(python::is_space) };
        let Some(cut) = cut.filter(|_| parts.len() + 1 < limit) else {
            parts.push(rest);
            break;
        };
        if right {
            parts.push(rest[cut..].trim_start_matches(python::is_space));
            rest = rest[..cut].trim_end_matches(python::is_space);
        } else {
            parts.push(&rest[..cut]);
            rest = rest[cut..].trim_start_matches(python::is_space);
        }
    }
    if right {
        parts.reverse();
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        let now = DateTime::constant(2024, 7, 26, 13, 5, 9, 0);
        let env = compile(source.to_owned(), now).unwrap();
        let context = minijinja::context! {
            data => Value::from(Serde(serde_json::json!({
                "z": [1, 2.5, true, null], "a": "é\"\n<'&>", "empty": {}, "none": []
            }))),
            text => "a-b--c",
        };
        let rendered = env.get_template(NAME).unwrap().render(context);
        assert_eq!(rendered.unwrap_or_else(|error| format!("error: {error}")), expected, "{source}");
    }

    #[test]
    fn json_is_pythons() {
        check("{{ data|tojson }}", r#"{"z": [1, 2.5, true, null], "a": "é\"\n<'&>", "empty": {}, "none": []}"#);
        check("{{ data.z|tojson(indent=2) }}", "[\n  1,\n  2.5,\n  true,\n  null\n]");
        check("{{ data.a|tojson(ensure_ascii=true) }}", r#""\u00e9\"\n<'&>""#);
        check("{{ {'b': 1, 'a': [2]}|tojson(separators=(',', ':'), sort_keys=true) }}", r#"{"a":[2],"b":1}"#);
    }

    #[test]
    fn values_print_as_in_python() {
        check("{{ true }} {{ none }} {{ missing }} {{ data.z }} {{ 1.0 }}", "True None  [1, 2.5, True, None] 1.0");
        check("{{ 'x' ~ true ~ none }}", "xTrueNone");
    }

    #[test]
    fn strings_behave_as_in_python() {
        check("{{ text.split('-') }} {{ text.rsplit('-', maxsplit=1)[-1] }}", "['a', 'b', '', 'c'] c");
        check("{{ ' a  b '.split() }}{{ '\u{1f}x '.strip() }}", "['a', 'b']x");
        check("{{ text[:3] }}{{ text[-1] }}{{ text[0] }}{{ 'x' * 3 }}", "a-bcaxxx");
        check("{{ text.partition('-')[2] }} {{ text.removeprefix('a') }}", "b--c -b--c");
        check(
            "{{ text is sequence }}{{ data is mapping }}{{ 1 is number }}{{ data.z is iterable }}",
            "TrueTrueTrueTrue",
        );
    }

    #[test]
    fn globals_of_transformers_exist() {
        check("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024");
        check(
            "{% set ns = namespace(n=1) %}{% for _ in range(3) %}{% set ns.n = ns.n + 1 %}{% break %}{% endfor %}{{ ns.n }}",
            "2",
        );
        check("{{ raise_exception('no tools') }}", "error: invalid operation: no tools (in chat_template:1)");
    }

    #[test]
    fn block_lines_leave_no_trace() {
        check("a\n  {% if true %}\nb\n  {%- endif %}\n\nc\n", "a\nb\nc");
    }
}
