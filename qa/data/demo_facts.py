"""What the built-in encyclopedia can say: six kinds of article and six facts of each.

This is data, and demo.py is the program that reads it. Bars separate alternatives; braces are filled in:

    {land}  the country of the article
    {a} {b} the two subjects of a passage
    {s}     a subject, in a question
    {x}     the value of a fact, and so the answer: a question asks for exactly what fills {x}

A passage states a fact as subject + predicate: "the Denton Bridge" + "was designed by Robin Mercer". There are two
facts of each type (a person designed the bridge, a person paid for it), so that a "who" alone does not say what
is meant; of two times, the first is the earlier. A phrasing belongs to one split.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """A relation of a subject to a value: the predicates that state it and the questions that ask for it."""

    type: str  # of the value: year, date, number, person, city or goods
    train_says: str
    train_asks: str
    held_out_says: str
    held_out_asks: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of article: what its subjects are called, how its passages open, and its facts, type by type."""

    title: str
    subject: str  # patterns for names, whose fields are the keys of demo.NAMES
    train_opens: str
    held_out_opens: str
    facts: tuple[Fact, ...]


PAINTERS = Kind(
    "Painters of {land}",
    subject="{first} {last}",
    train_opens="{a} and {b} were two painters from {land}|"
                "among the painters of {land}, {a} and {b} are the best remembered|"
                "every history of painting in {land} has a chapter on {a} and one on {b}",
    held_out_opens="the art of {land} owes much to {a} and to {b}|"
                   "{a} and {b} both shaped the taste of their age in {land}",
    facts=(
        Fact("year",
             "was born in {x}|came into the world in {x}|was born as a miller's child in {x}",
             "When was {s} born?|In what year did {s} come into the world?|What is the birth year of {s}?",
             "began life in {x}|had {x} as the year of birth",
             "What was the year of birth of {s}?|In which year did the life of {s} begin?"),
        Fact("year",
             "won a gold medal in {x}|received the royal medal in {x}|was given a medal in {x}",
             "When did {s} win a medal?|In what year was {s} given a medal?|In what year did {s} receive a medal?",
             "took home a silver medal in {x}|got a prize for art in {x}",
             "In which year did {s} get a prize?|What year brought {s} a medal?"),
        Fact("city",
             "grew up in {x}|spent an early childhood in {x}|was raised in {x}",
             "Where did {s} grow up?|In what town was {s} raised?|Where did {s} spend the years of childhood?",
             "was still a child in {x}|lived in {x} in early youth",
             "In which town was {s} a child?|Which town did {s} live in as a youth?"),
        Fact("city",
             "had a studio in {x}|painted in a studio in {x}|worked in {x}",
             "Where was the studio of {s}?|In what town did {s} paint?|Where did {s} work?",
             "opened a workshop in {x}|made most paintings in {x}",
             "In which town was the workshop of {s}?|In which town did {s} make paintings?"),
        Fact("person",
             "was taught by {x}|learned to paint from {x}|was a pupil of {x}",
             "Who taught {s}?|From whom did {s} learn to paint?|Who was the teacher of {s}?",
             "took lessons from {x}|was trained by {x}",
             "Which person trained {s}?|Who gave lessons to {s}?"),
        Fact("person",
             "married {x}|was married to {x}|became the spouse of {x}",
             "Who did {s} marry?|Who was {s} married to?|Who was the spouse of {s}?",
             "entered into marriage with {x}|held a wedding with {x}",
             "With which person did {s} hold a wedding?|Who entered into marriage with {s}?"),
    ))

TOWNS = Kind(
    "Towns of {land}",
    subject="{place}",
    train_opens="{a} and {b} are market towns in the hills of {land}|"
                "travellers who cross {land} pass through {a} and {b}|"
                "the road through {land} joins {a} to {b}",
    held_out_opens="two days apart by river, {a} and {b} lie in the south of {land}|"
                   "tourists in {land} like to compare {a} with {b}",
    facts=(
        Fact("year",
             "was founded in {x}|was founded by settlers in {x}|dates from {x}",
             "When was {s} founded?|In what year did settlers found {s}?|What year does {s} date from?",
             "was established by monks in {x}|celebrates its founding in {x}",
             "In which year was {s} established?|What is the year of the founding of {s}?"),
        Fact("year",
             "burned down in {x}|was destroyed by fire in {x}|lost its old houses in a fire in {x}",
             "When did {s} burn down?|In what year was {s} destroyed by fire?|What year was the fire in {s}?",
             "suffered a great fire in {x}|stood in flames in {x}",
             "In which year was there a great fire in {s}?|What year saw {s} in flames?"),
        Fact("person",
             "has {x} as its mayor|elected {x} as mayor|is governed by the mayor {x}",
             "Who is the mayor of {s}?|Who was elected mayor in {s}?|Who governs {s}?",
             "has a town hall led by {x}|chose {x} for the office of mayor",
             "Which person holds the office of mayor in {s}?|Who leads the town hall of {s}?"),
        Fact("person",
             "has a statue of {x}|put up a statue for {x}|honours {x} with a statue",
             "Whose statue stands in {s}?|Who is honoured by a statue in {s}?|Of whom does {s} have a statue?",
             "keeps a monument to {x}|shows {x} on a bronze statue",
             "Which person has a monument in {s}?|Who is shown by the bronze in {s}?"),
        Fact("goods",
             "exports {x}|sells {x} to other countries|ships {x} abroad",
             "What does {s} export?|What does {s} sell to other countries?|What is shipped abroad from {s}?",
             "lives from the export of {x}|sends {x} to foreign markets",
             "Which product does {s} send to foreign markets?|The export of what feeds {s}?"),
        Fact("goods",
             "imports {x}|buys {x} from other countries|brings in {x} from abroad",
             "What does {s} import?|What does {s} buy from other countries?|What is brought into {s} from abroad?",
             "depends on the import of {x}|needs {x} from foreign traders",
             "Which product does {s} need from foreign traders?|On the import of what does {s} depend?"),
    ))

COMPANIES = Kind(
    "Companies of {land}",
    subject="the {place} Company|the {place} Works",
    train_opens="{a} and {b} are the largest employers in {land}|the economy of {land} rests on {a} and {b}|"
                "in {land} the names of {a} and {b} are known to every child",
    held_out_opens="few firms in {land} are as old as {a} and {b}|"
                   "bankers in {land} speak of {a} and {b} with respect",
    facts=(
        Fact("person",
             "was founded by {x}|was the creation of the founder {x}|owes its foundation to {x}",
             "Who founded {s}?|Who was the founder of {s}?|To whom does {s} owe its foundation?",
             "was started by {x}|was set up by {x}",
             "Which person started {s}?|Who set up {s}?"),
        Fact("person",
             "is directed by {x}|has {x} as its director|is managed by {x}",
             "Who directs {s}?|Who is the director of {s}?|Who manages {s}?",
             "is led by {x}|has the manager {x}",
             "Which person leads {s}?|Who is the manager of {s}?"),
        Fact("city",
             "has its head office in {x}|is based in {x}|is directed from an office in {x}",
             "Where is the head office of {s}?|In what town is {s} based?|Where does {s} have an office?",
             "keeps its headquarters in {x}|has its main office in {x}",
             "In which town are the headquarters of {s}?|Which town has the main office of {s}?"),
        Fact("city",
             "runs a factory in {x}|built a factory in {x}|has its workers in {x}",
             "Where is the factory of {s}?|In what town did {s} build a factory?|Where are the workers of {s}?",
             "put up a large plant in {x}|keeps its machines in {x}",
             "In which town is the plant of {s}?|Which town has the machines of {s}?"),
        Fact("goods",
             "began with {x}|at first made {x}|sold {x} in its early days",
             "With what did {s} begin?|What did {s} make at first?|What did {s} sell in its early days?",
             "started out with {x}|originally produced {x}",
             "Which product did {s} start out with?|What did {s} originally produce?"),
        Fact("goods",
             "now makes {x}|sells {x} today|has lately turned to {x}",
             "What does {s} make now?|What does {s} sell today?|To what has {s} lately turned?",
             "currently produces {x}|lives on {x} nowadays",
             "Which product does {s} live on nowadays?|What does {s} currently produce?"),
    ))

BIRDS = Kind(
    "Birds of {land}",
    subject="the {place} warbler|the {place} finch|the {place} owl|the {place} heron",
    train_opens="{a} and {b} are rare birds of {land}|the forests of {land} are home to {a} and {b}|"
                "visitors to {land} hope to see {a} and {b}",
    held_out_opens="hunters in {land} can no longer shoot {a} or {b}|"
                   "{a} and {b} are often confused by bird lovers in {land}",
    facts=(
        Fact("person",
             "was first described by {x}|was discovered by {x}|was unknown before {x} described it",
             "Who first described {s}?|Who discovered {s}?|By whom was {s} described?",
             "was found by {x}|owes its discovery to {x}",
             "Which person found {s}?|To whom does {s} owe its discovery?"),
        Fact("person",
             "was named after {x}|bears the name of {x}|has a Latin name that honours {x}",
             "After whom was {s} named?|Whose name does {s} bear?|Who is honoured in the Latin name of {s}?",
             "got its name in honour of {x}|carries the name of {x}",
             "Which person's name does {s} carry?|In whose honour did {s} get its name?"),
        Fact("city",
             "breeds near {x}|builds its nest around {x}|lays its eggs near {x}",
             "Where does {s} breed?|Near what town does {s} build its nest?|Where does {s} lay its eggs?",
             "nests close to {x}|raises its young outside {x}",
             "Close to which town does {s} nest?|Outside which town does {s} raise its young?"),
        Fact("city",
             "winters near {x}|flies to {x} for the winter|spends the winter around {x}",
             "What town is the winter home of {s}?|To what town does {s} fly for the winter?|Where does {s} spend the winter?",
             "is seen in winter close to {x}|passes the cold months outside {x}",
             "Close to which town is {s} seen in winter?|Outside which town does {s} pass the cold months?"),
        Fact("number",
             "weighs {x} grams|has a weight of {x} grams|reaches a weight of {x} grams",
             "How many grams does {s} weigh?|What is the weight of {s}?|What weight does {s} reach?",
             "weighs in at {x} grams|is {x} grams in weight",
             "How many grams is {s} in weight?|How much does {s} weigh?"),
        Fact("number",
             "is {x} millimetres long|has a length of {x} millimetres|measures {x} millimetres",
             "How many millimetres long is {s}?|What is the length of {s}?|What does {s} measure?",
             "grows {x} millimetres long|is {x} millimetres in length",
             "How many millimetres is {s} in length?|How long does {s} grow?"),
    ))

OPERAS = Kind(
    "Operas of {land}",
    subject="The Siege of {place}|The Widow of {place}|The Bells of {place}|The Thief of {place}",
    train_opens="{a} and {b} are the best known operas from {land}|"
                "opera houses in {land} play {a} and {b} every year|"
                "no theatre in {land} can do without {a} and {b}",
    held_out_opens="music lovers in {land} are divided over {a} and {b}|"
                   "singers in {land} have to learn both {a} and {b}",
    facts=(
        Fact("person",
             "was composed by {x}|has music by {x}|was set to music by {x}",
             "Who composed {s}?|Who wrote the music of {s}?|Who set {s} to music?",
             "had {x} as its composer|owes its melodies to {x}",
             "Which person was the composer of {s}?|To whom does {s} owe its melodies?"),
        Fact("person",
             "is dedicated to {x}|was a gift to {x}|carries a dedication to {x}",
             "To whom is {s} dedicated?|To whom was {s} a gift?|Who is named in the dedication of {s}?",
             "was meant as a present for {x}|has a dedication that names {x}",
             "Which person does the dedication of {s} name?|For whom was {s} a present?"),
        Fact("year",
             "was written in {x}|was completed in {x}|was put on paper in {x}",
             "When was {s} written?|In what year was {s} completed?|In what year was {s} put on paper?",
             "was finished in {x}|came from the writing desk in {x}",
             "In which year was {s} finished?|What year saw the writing of {s}?"),
        Fact("year",
             "was published in {x}|appeared in print in {x}|was printed in {x}",
             "When was {s} published?|In what year did {s} appear in print?|In what year was {s} printed?",
             "came out as a printed book in {x}|found a publisher in {x}",
             "In which year did {s} find a publisher?|What year saw {s} as a printed book?"),
        Fact("city",
             "is set in {x}|tells a story set in {x}|takes place in {x}",
             "Where is {s} set?|In what town does {s} take place?|In what town is the story of {s} set?",
             "has its scenes in {x}|has a plot that unfolds in {x}",
             "In which town are the scenes of {s}?|Which town does the plot of {s} unfold in?"),
        Fact("city",
             "was first performed in {x}|had its premiere in {x}|was first heard in {x}",
             "Where was {s} first performed?|In what town did {s} have its premiere?|Where was {s} first heard?",
             "had its opening night in {x}|came to the stage in {x}",
             "In which town was the opening night of {s}?|Which town had {s} on the stage?"),
    ))

BRIDGES = Kind(
    "Bridges of {land}",
    subject="the {place} Bridge|the {place} Viaduct",
    train_opens="{a} and {b} are two of the great bridges of {land}|"
                "the railway through {land} depends on {a} and {b}|"
                "{a} and {b} cross the widest rivers in {land}",
    held_out_opens="engineers from {land} are proud of {a} and of {b}|"
                   "trains across {land} use both {a} and {b}",
    facts=(
        Fact("person",
             "was designed by {x}|was built to a design by {x}|had {x} as its architect",
             "Who designed {s}?|Whose is the design of {s}?|Who was the architect of {s}?",
             "was planned by {x}|follows the plans of {x}",
             "Which person planned {s}?|Whose plans does {s} follow?"),
        Fact("person",
             "was paid for by {x}|was built with money from {x}|cost {x} a fortune",
             "Who paid for {s}?|From whom came the money for {s}?|Whose fortune did {s} cost?",
             "was financed by {x}|swallowed the money of {x}",
             "Which person financed {s}?|Whose money did {s} swallow?"),
        Fact("date",
             "was opened on {x}|opened to traffic on {x}|has been in use since {x}",
             "When was {s} opened?|On what date did {s} open to traffic?|Since when is {s} in use?",
             "had its opening on {x}|carried its first traffic on {x}",
             "On which day was the opening of {s}?|On which day did {s} carry its first traffic?"),
        Fact("date",
             "was damaged by a storm on {x}|was damaged on {x}|lost a pillar in a storm on {x}",
             "When was {s} damaged?|On what date did a storm damage {s}?|When did {s} lose a pillar?",
             "suffered damage on {x}|was hit by a flood on {x}",
             "On which day did {s} suffer damage?|On which day did a flood hit {s}?"),
        Fact("number",
             "is {x} metres long|has a length of {x} metres|measures {x} metres",
             "How many metres long is {s}?|What is the length of {s}?|What does {s} measure?",
             "spans {x} metres|is {x} metres in length",
             "How many metres is {s} in length?|How many metres does {s} span?"),
        Fact("number",
             "contains {x} tons of steel|has a weight of {x} tons|weighs {x} tons",
             "How many tons of steel does {s} contain?|What is the weight of {s}?|How many tons does {s} weigh?",
             "consists of {x} tons of metal|is {x} tons in weight",
             "How many tons is {s} in weight?|How many tons of metal are in {s}?"),
    ))

KINDS = (PAINTERS, TOWNS, COMPANIES, BIRDS, OPERAS, BRIDGES)
