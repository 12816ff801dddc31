// One request of the page's; what goes wrong is an Error in words, whatever came back.

export async function ask(url, options) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch {
    throw new Error("the viewer does not answer");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null); // a server that is too busy says so in plain text
  throw new Error(told?.error ?? (answer.status === 503 ? "the viewer is busy" : `the viewer says ${answer.status} ${answer.statusText}`));
}
